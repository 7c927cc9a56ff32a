"""align: units are reordered, and added, so that N:M and block patterns fit."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.channels import Member, Ties, Units, find_ties, members, units
from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.alignment import deal, exchange, gather, kept_energy
from elsa_compile.passes.allocation import DEFAULT_SPARSITY
from elsa_compile.passes.removal import Kept, shrunk_plan
from elsa_compile.passes.unit_order import apply_change, entries, grown, reordered
from elsa_compile.patterns import NM, Block, parse_pattern
from elsa_compile.program import Program

Aim = tuple[NM | Block, float]  # pattern and sparsity
_SWEEPS = 8


@register_pass
@dataclass(frozen=True, kw_only=True)
class Align(Pass):
    """Reorder neurons and channels so that N:M or block patterns keep more; pad them so they fit.

    The units between two layers may stand in any order. For N:M they are mixed, so that large and
    small ones share the groups; for blocks they are sorted. A number of units that the pattern does
    not divide is filled up with zeros, the model's width never. Put it before pruning, with padding
    before the allocation.
    """

    name: ClassVar[str] = "align"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

    pattern: str | None = option(
        None, "N:M as in 2:4, or a block as in 4x4; null: that of each weight's plan"
    )
    sparsity: float | None = option(
        None, "of a block pattern, 0.5 when null; N:M and plans have their own", low=0.0, below=1.0
    )
    pad: bool = option(True, "add units of zeros where the pattern does not divide their number")
    permute: bool = option(True, "reorder units")
    rounds: int = option(32, "N:M: how often groups are paired to exchange units", low=0)

    def __post_init__(self) -> None:
        """Also refuse a pattern without groups."""
        super().__post_init__()
        if self.pattern is not None and not isinstance(parse_pattern(self.pattern), (NM, Block)):
            raise UserInputError(
                f"{self.name}: pattern {self.pattern} fits any size and order; wanted N:M as in "
                "2:4 or a block as in 4x4"
            )

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Pad, then reorder; each is undone where the model would compute something else."""
        stats = PassStats(counts={"reordered": 0, "added_units": 0})
        aims = self._aims(program)
        if self.pad:
            self._pad(program, aims, stats)
        for name in list(aims):
            why = aims[name][0].problem(program.weights[name].matrix_shape)
            if why is not None:
                stats.notes.append(f"{name} {why}; its size cannot change here")
                del aims[name]
        before = _energy(program, aims)
        if self.permute:
            moved: set[str] = set()
            for _ in range(_SWEEPS):  # blocks of a chain of layers depend on each other
                if not self._permute(program, aims, ctx, stats, moved):
                    break
            stats.counts["reordered"] = len(moved)
            stats.notes = list(dict.fromkeys(stats.notes))  # every sweep finds the same reasons
        after, total = _energy(program, aims), _energy(program, aims, whole=True)
        if total:
            stats.counts |= {"kept_before": before / total, "kept_after": after / total}
            stats.notes.append(
                f"the pattern keeps {after / total:.2%} of the squares of {len(aims)} weights, "
                f"before {before / total:.2%}"
            )
        stats.changed = int(stats.counts["reordered"] + stats.counts["added_units"])
        return stats

    def _aims(self, program: Program) -> dict[str, Aim]:
        """The pattern of every weight that is to have one.

        Raises:
            UserInputError: neither the option nor a plan names one.
        """
        aims: dict[str, Aim] = {}
        wanted = None if self.pattern is None else parse_pattern(self.pattern)
        for name, weight in program.prunable.items():
            plan = program.plans.get(name)
            head = weight.is_head and program.kind == "decoder"
            if head if plan is None else plan.skipped is not None:
                continue
            pattern = wanted or (None if plan is None else plan.pattern)
            share = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
            if wanted is None and plan is not None:
                share = plan.sparsity
            if isinstance(pattern, (NM, Block)):
                aims[name] = (pattern, pattern.implied_sparsity() or share)
        if not aims:
            raise UserInputError(
                f"{self.name}: no weight has an N:M or block pattern; set {self.name}.pattern, as "
                "in 2:4, or put it behind an allocation with such a pattern"
            )
        return aims

    def _pad(self, program: Program, aims: dict[str, Aim], stats: PassStats) -> None:
        """Add units of zeros to every layer whose number of units the patterns do not divide."""
        found = find_ties(program)
        growing: list[Units] = []
        kept: Kept = {}
        added = 0
        for group in units(found):
            parts = [m for m in members(found, group) if m.weight in aims]
            count = _fitting_count(group, parts, aims)
            if group.pinned is None and group.kind != "heads" and count > group.count > 1:
                larger = grown(group, count)
                why = _broken_plan(found, group, larger)
                if why is not None:
                    stats.notes.append(f"{group.name}: not padded: {why}")
                    continue
                growing.append(group)
                kept |= larger
                added += count - group.count
        problem = apply_change(found, growing, kept, added=True)
        if problem is not None:
            stats.notes.append(f"nothing was padded: {problem}")
        else:
            stats.counts["added_units"] += added

    def _permute(
        self,
        program: Program,
        aims: dict[str, Aim],
        ctx: Context,
        stats: PassStats,
        moved: set[str],
    ) -> bool:
        """Reorder every group that gains; True when blocks gained, which may gain more.

        The names of what was reordered are added to `moved`.
        """
        found = find_ties(program)
        chosen: list[Units] = []
        kept: Kept = {}
        blocks = False
        for group in units(found):
            parts = [m for m in members(found, group) if _concerned(m, aims)]
            if group.pinned is not None or group.kind == "heads" or not parts:
                continue
            if any(plan.mask is not None for m in parts if (plan := program.plans.get(m.weight))):
                stats.notes.append(f"{group.name}: pruned already; put {self.name} before that")
                continue
            order = self._order(program, group, parts, aims, ctx)
            change = None if order is None else reordered(group, order)
            if change is None:
                continue
            problem = _broken_plan(found, group, change)
            if problem is not None:
                stats.notes.append(f"{group.name}: stays as it is: {problem}")
                continue
            chosen.append(group)
            kept |= change
            blocks |= any(isinstance(aims[m.weight][0], Block) for m in parts)
        problem = apply_change(found, chosen, kept, added=False)
        if problem is not None:
            names = ", ".join(group.name for group in chosen)
            stats.notes.append(f"{names}: not reordered: {problem}")
            return False
        moved.update(group.name for group in chosen)
        return blocks

    def _order(
        self,
        program: Program,
        group: Units,
        parts: list[Member],
        aims: dict[str, Aim],
        ctx: Context,
    ) -> Tensor | None:
        """The unit that comes to each place, or None where the order that is keeps as much."""
        now = sum(_member_energy(program, m, aims, None) for m in parts)
        energy = sum(_unit_energy(program, m, group.count) for m in parts)
        assert isinstance(energy, Tensor)
        pattern = aims[parts[0].weight][0]
        plain = all(m.labels.equal(torch.arange(group.count)) for m in parts)
        if isinstance(pattern, Block):
            order = gather(energy)
        elif group.count % pattern.of == 0:
            order = deal(energy, pattern.of)
            if plain and len({aims[m.weight][0] for m in parts}) == 1:
                squares = [program.weights[m.weight].matrix()[:, order].square() for m in parts]
                generator = ctx.generator()
                swaps = exchange(
                    torch.cat(squares).float(), pattern.keep, pattern.of, self.rounds, generator
                )
                order = order[swaps]
        else:
            return None
        gained = sum(_member_energy(program, m, aims, order) for m in parts) - now
        return order if gained > 1e-6 * now else None


# --- What a pattern keeps -----------------------------------------------------------------


def _concerned(member: Member, aims: dict[str, Aim]) -> bool:
    """Whether the order of a member's units matters to its pattern."""
    if member.weight not in aims:
        return False
    pattern = aims[member.weight][0]
    if isinstance(pattern, NM):
        return member.axis == 1
    return (pattern.rows if member.axis == 0 else pattern.cols) > 1


def _unit_energy(program: Program, member: Member, count: int) -> Tensor:
    """(count,) float64, the squares in the rows or columns of each unit."""
    lines = program.weights[member.weight].matrix().double().square().sum(dim=1 - member.axis)
    return torch.zeros(count, dtype=torch.float64).index_add_(0, member.labels, lines.cpu())


def _member_energy(
    program: Program, member: Member, aims: dict[str, Aim], order: Tensor | None
) -> float:
    """What the pattern keeps of one matrix when its units are reordered."""
    matrix = program.weights[member.weight].matrix()
    if order is not None:
        lines = torch.from_numpy(entries(member.labels.numpy(), order.numpy()))
        matrix = matrix.index_select(member.axis, lines.to(matrix.device))
    return kept_energy(matrix, *aims[member.weight])


def _energy(program: Program, aims: dict[str, Aim], whole: bool = False) -> float:
    """Over all weights that have a pattern; whole: of everything, kept or not."""
    matrices = {name: program.weights[name].matrix() for name in aims}
    if whole:
        return sum(float(m.double().square().sum()) for m in matrices.values())
    return sum(kept_energy(m, *aims[name]) for name, m in matrices.items())


def _fitting_count(group: Units, parts: list[Member], aims: dict[str, Aim]) -> int:
    """The least number of units, from what there are, that the patterns divide."""
    unit = 1
    for member in parts:
        pattern = aims[member.weight][0]
        step = (1, pattern.of) if isinstance(pattern, NM) else (pattern.rows, pattern.cols)
        width = max(len(member.labels) // group.count, 1)  # rows or columns of one unit
        unit = math.lcm(unit, step[member.axis] // math.gcd(step[member.axis], width))
    return -(-group.count // unit) * unit


def _broken_plan(found: Ties, group: Units, kept: Kept) -> str | None:
    """Why a plan cannot follow, or None."""
    for member in members(found, group):
        plan = found.program.plans.get(member.weight)
        if plan is not None:
            result = shrunk_plan(found, found.program.weights[member.weight], plan, kept)
            if isinstance(result, str):
                return result
    return None
