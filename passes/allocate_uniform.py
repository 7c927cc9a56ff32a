"""allocate-uniform: the same sparsity for every targeted weight."""

from dataclasses import dataclass
from typing import ClassVar

from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.selection import check_entries, matches
from elsa_compile.patterns import Pattern, parse_pattern
from elsa_compile.program import Program, Weight, WeightPlan

DEFAULT_SPARSITY = 0.5
HEAD = "the output head; name it in targets to prune it"


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


@register_pass
@dataclass(frozen=True, kw_only=True)
class AllocateUniform(Pass):
    """Give every targeted weight the same sparsity and pattern.

    Without `targets`, all linear layers and convolutions are meant, except the output head of a
    language model: its rows are whole tokens, and pruning it costs far more accuracy than bytes.
    """

    name: ClassVar[str] = "allocate-uniform"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.EXPORTABLE})

    sparsity: float | None = option(
        None,
        "fraction of zeros in each weight; null: 0.5, or what an N:M pattern implies",
        low=0.0,
        below=1.0,
    )
    pattern: str = option("unstructured", "unstructured, row, N:M as in 2:4, or a block as in 4x4")
    targets: list[str] = option(
        [], "weights to prune: names, module types, or re:<expression>; empty: the model's body"
    )
    ignore: list[str] = option([], "weights to leave dense, written like targets")

    def __post_init__(self) -> None:
        """Also check that sparsity and pattern agree, before any work starts."""
        super().__post_init__()
        resolve_sparsity(self.sparsity, parse_pattern(self.pattern), self.name)

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Write a plan for every prunable weight."""
        pattern = parse_pattern(self.pattern)
        sparsity = resolve_sparsity(self.sparsity, pattern, self.name)
        weights = list(program.prunable.values())
        check_entries(f"{self.name}: targets", self.targets, weights)
        check_entries(f"{self.name}: ignore", self.ignore, weights)
        plans = {w.name: self._plan(w, program.kind, sparsity, pattern) for w in weights}
        planned = [plan for plan in plans.values() if plan.skipped is None]
        if not planned:
            raise UserInputError(
                f"{self.name}: no weight is left to prune among {len(weights)} linear layers and "
                "convolutions; check targets and ignore"
            )
        changed = sum(plans[name] != program.plans.get(name) for name in plans)
        program.plans.clear()
        program.plans.update(plans)
        return PassStats(
            changed=changed,
            counts={"planned": len(planned), "skipped": len(plans) - len(planned)},
        )

    def _plan(self, weight: Weight, kind: str, sparsity: float, pattern: Pattern) -> WeightPlan:
        shape = weight.matrix_shape
        if any(matches(entry, weight) for entry in self.ignore):
            return WeightPlan(shape, skipped="listed in ignore")
        if self.targets and not any(matches(entry, weight) for entry in self.targets):
            return WeightPlan(shape, skipped="not among targets")
        if not self.targets and weight.is_head and kind == "decoder":
            return WeightPlan(shape, skipped=HEAD)
        problem = pattern.problem(shape)
        if problem is not None:
            raise UserInputError(
                f"{self.name}: {weight.name} {problem}; add it to ignore or choose another pattern"
            )
        return WeightPlan(shape, sparsity, pattern)
