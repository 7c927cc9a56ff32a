"""Whole neurons and heads: several matrices that share one choice of units.

A unit's score is the sum of the scores of all entries that leave with it: its rows in the matrices
that make it, its columns in the one that reads it. The best units of each layer stay, everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_compile.channels import Member, find_ties, members, units
from elsa_compile.errors import UserInputError
from elsa_compile.patterns import Neurons, keep_largest, pruned_count
from elsa_compile.program import Program, WeightPlan


@dataclass(frozen=True)
class Coupling:
    """Matrices that share their units.

    Attributes:
        name: of the weight that reads the units.
        count: units.
        sparsity: share of units to prune.
        members: the matrices, and which unit each row or column belongs to.
    """

    name: str
    count: int
    sparsity: float
    members: tuple[Member, ...]


def _groups(program: Program, kind: str) -> list[tuple[str, int, tuple[Member, ...]]]:
    found = find_ties(program)
    free = [g for g in units(found) if g.pinned is None and g.kind == kind]
    return [(g.name, g.count, tuple(members(found, g))) for g in free]


def unit_counts(program: Program, pattern: Neurons) -> dict[str, int]:
    """How many units each weight has that is part of whole neurons or heads."""
    counts: dict[str, int] = {}
    for _, count, parts in _groups(program, str(pattern)):
        for part in parts:
            counts.setdefault(part.weight, count)
    return counts


def couplings(program: Program, plans: Mapping[str, WeightPlan], where: str) -> list[Coupling]:
    """The groups whose weights are planned as whole neurons or heads.

    Args:
        program: the model.
        plans: by weight; those with a unit pattern and zeros to make are looked at.
        where: for messages.

    Raises:
        UserInputError: weights that share units are planned differently, or there are no units.
    """
    wanted = {
        name: plan for name, plan in plans.items()
        if plan.skipped is None and plan.sparsity > 0 and isinstance(plan.pattern, Neurons)
    }  # fmt: skip
    result: list[Coupling] = []
    for kind in dict.fromkeys(str(plan.pattern) for plan in wanted.values()):
        for name, count, parts in _groups(program, kind):
            here = {p.weight for p in parts if p.weight in wanted}
            if not here:
                continue
            first = min(here)
            for part in parts:
                plan = wanted.get(part.weight)
                same = plan is not None and str(plan.pattern) == kind
                if plan is None or not same or plan.sparsity != wanted[first].sparsity:
                    raise UserInputError(
                        f"{where}: {first} is planned as {kind} with sparsity "
                        f"{wanted[first].sparsity:g}, but {part.weight}, which shares its {kind}, "
                        "is not; plan them alike or leave out both"
                    )
            result.append(Coupling(name, count, wanted[first].sparsity, parts))
    covered = {part.weight for each in result for part in each.members}
    for name, plan in wanted.items():
        if name not in covered:
            raise UserInputError(
                f"{where}: {name} is planned as {plan.pattern}, but the graph has no whole "
                f"{plan.pattern} there; choose another pattern for it"
            )
    return result


def unit_scores(scores: Mapping[str, Tensor], coupling: Coupling) -> Tensor:
    """Score of each unit.

    Args:
        scores: weight -> (N, K) float, at least those of the coupling's members.
        coupling: with U units.

    Returns:
        (U,) float: the sum over all rows and columns that leave with a unit.
    """
    first = scores[coupling.members[0].weight]
    total = torch.zeros(coupling.count, dtype=torch.float64, device=first.device)
    for member in coupling.members:
        lines = scores[member.weight].sum(dim=1 - member.axis, dtype=torch.float64)
        total.index_add_(0, member.labels.to(lines.device), lines)
    return total.float()


def coupled_masks(
    scores: Mapping[str, Tensor],
    group: Sequence[Coupling],
    sparsities: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Masks of all matrices of some couplings: the projection onto whole units.

    Args:
        scores: weight -> (N, K) float.
        group: the couplings; a matrix may be in two, with rows in one and columns in the other.
        sparsities: coupling's name -> share of units to prune now, where it differs from the plan.

    Returns:
        Weight -> (N, K) bool, True = kept. Of equal scores the first units are kept.
    """
    masks: dict[str, Tensor] = {}
    for coupling in group:
        sparsity = (sparsities or {}).get(coupling.name, coupling.sparsity)
        keep = coupling.count - pruned_count(coupling.count, sparsity)
        kept = keep_largest(unit_scores(scores, coupling)[None], max(keep, 1))[0]
        for member in coupling.members:
            lines = kept[member.labels.to(kept.device)]
            shape = scores[member.weight].shape
            mask = (lines[:, None] if member.axis == 0 else lines[None, :]).expand(shape)
            old = masks.get(member.weight)
            masks[member.weight] = mask.clone() if old is None else old & mask
    return masks


def refuse_coupled(program: Program, where: str) -> None:
    """Raise UserInputError when a weight is planned as whole neurons or heads."""
    for weight, plan in program.planned():
        if isinstance(plan.pattern, Neurons):
            raise UserInputError(
                f"{where}: {weight.name} is planned as {plan.pattern}, but this pass prunes each "
                "matrix by itself; use prune-elsa, prune-wanda or prune-magnitude"
            )
