"""prune-magnitude: the smallest weights go."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, register_pass
from elsa_compile.passes.coupled_units import Coupling, coupled_masks, couplings
from elsa_compile.passes.masking import apply_mask, finish
from elsa_compile.patterns import Pattern
from elsa_compile.program import Program


def magnitude_mask(weight: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mask of the largest absolute values.

    Args:
        weight: (N, K) float.
        sparsity: fraction of zeros.
        pattern: which entries are compared with each other.

    Returns:
        (N, K) bool, True = kept. Of equal magnitudes the first ones are kept.
    """
    return pattern.keep_mask(weight.abs().float(), sparsity)


def magnitudes_of_units(
    program: Program, where: str, device: torch.device
) -> tuple[dict[str, Tensor], list[Coupling]]:
    """(weight -> |W| (N, K), couplings) of what is planned as whole neurons or heads."""
    found = couplings(program, program.plans, where)
    names = {member.weight for coupling in found for member in coupling.members}
    weights = program.weights
    return {n: weights[n].matrix().to(device).abs().float() for n in sorted(names)}, found


@register_pass
@dataclass(frozen=True, kw_only=True)
class PruneMagnitude(Pass):
    """Zero the smallest weights; needs no data (Han et al., arXiv 1506.02626).

    Patterns decide what competes: unstructured compares within the whole weight, row within each
    output, N:M within each group along the input, a block by the sum of its magnitudes, whole
    neurons and heads by the sum over all the rows and columns that leave with them.
    """

    name: ClassVar[str] = "prune-magnitude"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MASKED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLANNED, Fact.EXPORTABLE})

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Mask every planned weight."""
        stats = PassStats()
        planned = list(program.planned())
        together = coupled_masks(*magnitudes_of_units(program, self.name, ctx.device))
        with ctx.progress.stage(self.name, len(planned), "weights") as stage:
            for weight, plan in planned:
                matrix = weight.matrix().to(ctx.device)
                mask = together.get(weight.name)
                if mask is None:
                    mask = magnitude_mask(matrix, plan.sparsity, plan.pattern)
                stats.changed += apply_mask(weight, plan, torch.where(mask, matrix, 0), mask)
                stage.advance(detail=weight.name)
        return finish(program, stats)
