"""What the allocating passes share: their options, whom they plan, exact counts, the plans.

A plan's sparsity is a number a person may edit, but what is pruned is whole pieces: single entries,
one entry of every row, tiles. So totals are counted in pieces, and a sparsity is the shortest
decimal number that every pruner rounds to the counted pieces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from elsa_compile.data import Samples
from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option
from elsa_compile.passes.coupled_units import couplings, unit_counts
from elsa_compile.passes.selection import check_entries, matches
from elsa_compile.patterns import (
    NM,
    Block,
    Neurons,
    Pattern,
    Unstructured,
    parse_pattern,
    pruned_count,
)
from elsa_compile.program import Program, Weight, WeightPlan

DEFAULT_SPARSITY = 0.5
HEAD = "the output head; name it in targets to prune it"

# Entries to prune in all -> pieces to prune of each weight, in the order of the plans.
Distribution = Callable[[int], list[int]]
NO_DATA = "without data all layers are planned alike; a compilation plans them by the data"


def pattern_option() -> Any:
    """The option `pattern`."""
    return option(
        "unstructured", "unstructured, row, N:M as in 2:4, a block as in 4x4, neurons, or heads"
    )


def targets_option() -> Any:
    """The option `targets`."""
    return option(
        [], "weights to prune: names, module types, or re:<expression>; empty: the model's body"
    )


def ignore_option() -> Any:
    """The option `ignore`."""
    return option([], "weights to leave dense, written like targets")


def samples_option(default: int) -> Any:
    """The option `samples`."""
    return option(default, "calibration samples to use, at most", low=1)


class Allocator(Protocol):
    """What a pass that chooses weights says about itself."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def targets(self) -> list[str]:
        """Its option."""

    @property
    def ignore(self) -> list[str]:
        """Its option."""


def resolve_sparsity(sparsity: float | None, pattern: Pattern, where: str) -> float:
    """The sparsity to aim at: as given, as the pattern implies, or 0.5.

    >>> from elsa_compile.patterns import NM
    >>> resolve_sparsity(None, NM(1, 4), "")
    0.75

    Raises:
        UserInputError: the pattern allows one sparsity only and another was given.
    """
    implied = pattern.implied_sparsity()
    if implied is None:
        return DEFAULT_SPARSITY if sparsity is None else sparsity
    if sparsity is not None and abs(sparsity - implied) > 1e-9:
        raise UserInputError(
            f"{where}: sparsity {sparsity:g} contradicts pattern {pattern}, which always gives "
            f"{implied:g}; leave sparsity out or choose another pattern"
        )
    return implied


def refuse_fixed(pattern: Pattern, where: str) -> None:
    """Raise UserInputError for a pattern that leaves nothing to distribute."""
    if isinstance(pattern, NM):
        raise UserInputError(
            f"{where}: pattern {pattern} gives every weight the sparsity "
            f"{pattern.implied_sparsity():g}, so there is nothing to distribute; use "
            "allocate-uniform, or the pattern unstructured, row or a block"
        )
    if isinstance(pattern, Neurons):
        raise UserInputError(
            f"{where}: pattern {pattern} couples weights, which this pass plans one by one; use "
            "allocate-uniform, and edit its plan to give layers shares of their own"
        )


def choose(
    owner: Allocator, program: Program, pattern: Pattern, sparsity: float = 0.0
) -> dict[str, WeightPlan]:
    """A plan for every prunable weight: skipped for a reason, or with this sparsity and pattern.

    Raises:
        UserInputError: an entry that names nothing, a pattern that does not fit, nothing to prune.
    """
    weights = list(program.prunable.values())
    check_entries(f"{owner.name}: targets", owner.targets, weights)
    check_entries(f"{owner.name}: ignore", owner.ignore, weights)
    plans = {w.name: _plan(owner, w, program.kind, sparsity, pattern) for w in weights}
    if isinstance(pattern, Neurons):
        counts = unit_counts(program, pattern)
        for name, plan in plans.items():
            if name in counts:
                plan.pattern = type(pattern)(counts[name])
            elif plan.skipped is None:
                plans[name] = WeightPlan(plan.shape, skipped=f"no weight of whole {pattern}")
        couplings(program, plans, owner.name)
    if all(plan.skipped is not None for plan in plans.values()):
        raise UserInputError(
            f"{owner.name}: no weight is left to prune among {len(weights)} linear layers and "
            "convolutions; check targets and ignore"
        )
    return plans


def _plan(
    owner: Allocator, weight: Weight, kind: str, sparsity: float, pattern: Pattern
) -> WeightPlan:
    shape = weight.matrix_shape
    if any(matches(entry, weight) for entry in owner.ignore):
        return WeightPlan(shape, skipped="listed in ignore")
    if owner.targets and not any(matches(entry, weight) for entry in owner.targets):
        return WeightPlan(shape, skipped="not among targets")
    if not owner.targets and weight.is_head and kind == "decoder":
        return WeightPlan(shape, skipped=HEAD)
    problem = pattern.problem(shape)
    if problem is not None:
        raise UserInputError(
            f"{owner.name}: {weight.name} {problem}; add it to ignore or choose another pattern"
        )
    return WeightPlan(shape, sparsity, pattern)


# --- Exact counts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """A weight as `count` equal pieces of `size` entries, each kept or pruned as a whole."""

    count: int
    size: int

    @property
    def entries(self) -> int:
        """Entries of the weight."""
        return self.count * self.size


def pieces(plan: WeightPlan) -> Pieces:
    """What a weight's pattern divides it into.

    >>> pieces(WeightPlan((8, 4), pattern=Block(2, 2)))
    Pieces(count=8, size=4)
    """
    rows, columns = plan.shape
    if isinstance(plan.pattern, Block):
        size = plan.pattern.rows * plan.pattern.cols
        return Pieces(rows * columns // size, size)
    if isinstance(plan.pattern, Unstructured) and plan.pattern.per_row:
        return Pieces(columns, rows)
    if isinstance(plan.pattern, Neurons) and plan.pattern.count:
        return Pieces(plan.pattern.count, rows * columns // plan.pattern.count)
    return Pieces(rows * columns, 1)


def exact_zeros(sparsities: Sequence[float], parts: Sequence[Pieces], total: int) -> list[int]:
    """Pieces to prune of each weight, so that together they hold `total` entries.

    Every weight is rounded down, then pieces go where rounding took most. Each weight keeps a
    piece. The total is met exactly for single entries, else to less than the largest piece.

    >>> exact_zeros([0.5, 0.5], [Pieces(3, 1), Pieces(5, 1)], 4)
    [2, 2]
    """
    wanted = [min(s * p.count, p.count - 1) for s, p in zip(sparsities, parts, strict=True)]
    zeros = [int(value) for value in wanted]
    missing = total - sum(z * p.size for z, p in zip(zeros, parts, strict=True))
    order = sorted(range(len(parts)), key=lambda i: zeros[i] - wanted[i])
    progress = True
    while missing > 0 and progress:
        progress = False
        for i in order:
            if parts[i].size <= missing and zeros[i] < parts[i].count - 1:
                zeros[i] += 1
                missing -= parts[i].size
                progress = True
    return zeros


def evenly(parts: Sequence[Pieces]) -> Distribution:
    """The distribution that gives every weight the same sparsity."""
    entries = sum(part.entries for part in parts)
    return lambda total: exact_zeros([total / entries] * len(parts), parts, total)


def sparsity_of(zeros: int, count: int) -> float:
    """The shortest decimal fraction that `pruned_count` rounds to `zeros` of `count`.

    >>> sparsity_of(2, 3), sparsity_of(123, 1000)
    (0.7, 0.123)
    """
    for digits in range(1, 16):
        short = round(zeros / count, digits)
        if short < 1 and pruned_count(count, short) == zeros:
            return short
    return zeros / count


# --- Plans --------------------------------------------------------------------------------


def planned(plans: dict[str, WeightPlan]) -> dict[str, WeightPlan]:
    """The plans of the weights that are not skipped."""
    return {name: plan for name, plan in plans.items() if plan.skipped is None}


def set_zeros(plans: dict[str, WeightPlan], zeros: Sequence[int]) -> None:
    """Write the sparsity of each weight that is not skipped, from its number of pruned pieces."""
    for plan, count in zip(planned(plans).values(), zeros, strict=True):
        plan.sparsity = sparsity_of(count, pieces(plan).count)


def distribute(
    owner: Allocator,
    program: Program,
    ctx: Context,
    pattern: Pattern,
    sparsity: float,
    measure: Callable[[dict[str, WeightPlan]], Distribution],
) -> PassStats:
    """Plan all weights that are meant so that together they have exactly `sparsity`.

    Args:
        owner: the pass.
        program: gets the plans.
        ctx: without samples, which only an estimate lacks, all layers are planned alike.
        pattern: of every plan.
        sparsity: of all planned entries together.
        measure: plans of the weights to prune -> how a total is distributed among them.
    """
    plans = choose(owner, program, pattern)
    chosen = planned(plans)
    parts = [pieces(plan) for plan in chosen.values()]
    distribution = evenly(parts) if ctx.samples is None else measure(chosen)
    set_zeros(plans, distribution(pruned_count(sum(p.entries for p in parts), sparsity)))
    stats = write_plans(program, plans)
    stats.notes += [NO_DATA] if ctx.samples is None else []
    return stats


@dataclass(frozen=True, kw_only=True)
class MeasuringAllocator(Pass):
    """What the passes share that distribute zeros by what they measure on samples."""

    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.EXPORTABLE})
    needs_data: ClassVar[bool] = True

    sparsity: float = option(
        DEFAULT_SPARSITY, "fraction of zeros in all weights together", low=0.0, below=1.0
    )
    pattern: str = pattern_option()
    targets: list[str] = targets_option()
    ignore: list[str] = ignore_option()
    samples: int = samples_option(128)

    def __post_init__(self) -> None:
        """Also check that the pattern leaves something to distribute."""
        super().__post_init__()
        refuse_fixed(parse_pattern(self.pattern), self.name)

    def measure(
        self, program: Program, plans: dict[str, WeightPlan], ctx: Context, samples: Samples
    ) -> Distribution:
        """What distributes a total among the plans, by what the samples show."""
        raise NotImplementedError

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Measure, distribute, write a plan for every prunable weight."""
        samples = ctx.samples and ctx.samples.take(self.samples, ctx.seed)

        def measure(plans: dict[str, WeightPlan]) -> Distribution:
            assert samples is not None
            return self.measure(program, plans, ctx, samples)

        pattern = parse_pattern(self.pattern)
        return distribute(self, program, ctx, pattern, self.sparsity, measure)


def write_plans(program: Program, plans: dict[str, WeightPlan]) -> PassStats:
    """Replace the program's plans; say how much of the model they will prune.

    The counts: planned and skipped weights; share_of_model, the fraction of all parameters that
    will be zero; share_of_body, the same without embeddings and the output head.
    """
    changed = sum(plans[name] != program.plans.get(name) for name in plans)
    program.plans.clear()
    program.plans.update(plans)
    chosen = planned(plans)
    zeros = {name: _entries_pruned(plan) for name, plan in chosen.items()}
    sizes = {w.name: w.parameter.numel() for w in program.weights.values()}
    body = [w.name for w in program.weights.values() if w.kind != "embedding" and not w.is_head]
    counts: dict[str, float] = {
        "planned": len(chosen),
        "skipped": len(plans) - len(chosen),
        "share_of_body": sum(zeros.get(n, 0) for n in body) / max(sum(sizes[n] for n in body), 1),
        "share_of_model": sum(zeros.values()) / max(sum(sizes.values()), 1),
    }
    return PassStats(changed=changed, counts=counts)


def _entries_pruned(plan: WeightPlan) -> int:
    part = pieces(plan)
    return pruned_count(part.count, plan.sparsity) * part.size
