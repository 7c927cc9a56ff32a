"""prune-wanda: weights by magnitude times the norm of the input they meet."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.coupled_units import coupled_masks, couplings
from elsa_compile.passes.layerwise import prune_layerwise
from elsa_compile.passes.masking import apply_mask
from elsa_compile.patterns import Neurons, Pattern, Unstructured
from elsa_compile.program import Program, Weight, WeightPlan


def wanda_mask(weight: Tensor, square_sum: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mask of the largest |W_ij| * ||X_j|| (Wanda, equation 1).

    Args:
        weight: (N, K) float.
        square_sum: (K,) float, sum of squares of each input over all calibration tokens.
        sparsity: fraction of zeros.
        pattern: which entries are compared with each other.

    Returns:
        (N, K) bool, True = kept.
    """
    return pattern.keep_mask(weight.abs().float() * square_sum.float().sqrt(), sparsity)


class SquareSums:
    """Sum of squares of each input feature over the rows seen."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Take in rows (M, K)."""
        self.total += rows.float().square().sum(dim=0)

    def norms(self) -> Tensor:
        """(K,) float32, the norm of each feature."""
        return self.total.float().sqrt()


class _Together:
    """Whole neurons and heads: a choice is made when all matrices of a unit have been seen.

    Until then they stay dense. What was observed behind them stays right: columns that are zeroed
    later read exactly the units that go.
    """

    def __init__(self, program: Program, where: str) -> None:
        self.program = program
        self.waiting = couplings(program, program.plans, where)
        self.scores: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def mask(self, weight: Weight, scores: Tensor) -> Tensor:
        """Take in the scores (N, K) of one matrix; its mask as far as it is decided."""
        self.scores[weight.name] = scores
        self.masks[weight.name] = torch.ones_like(scores, dtype=torch.bool)
        known = self.scores.keys()
        ready = [c for c in self.waiting if all(m.weight in known for m in c.members)]
        self.waiting = [c for c in self.waiting if c not in ready]
        for name, mask in coupled_masks(self.scores, ready).items():
            self.masks[name] &= mask
            if name != weight.name:
                other = self.program.weights[name]
                matrix = other.matrix().to(mask.device)
                apply_mask(other, self.program.plans[name], matrix, self.masks[name])
        return self.masks[weight.name]


@register_pass
@dataclass(frozen=True, kw_only=True)
class PruneWanda(Pass):
    """Zero weights with small |weight| x input norm; needs data (Wanda, arXiv 2306.11695).

    Layer by layer: a layer's inputs are those of the model already pruned before it.
    """

    name: ClassVar[str] = "prune-wanda"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MASKED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLANNED, Fact.EXPORTABLE})
    needs_data: ClassVar[bool] = True

    samples: int = option(128, "calibration samples to use, at most", low=1)
    per_row: bool = option(
        True, "compare within each output row, as the paper does, when the plan says unstructured"
    )

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Observe, mask and advance, one segment after another."""
        together = _Together(program, self.name)

        def prune(weight: Weight, plan: WeightPlan, seen: SquareSums) -> tuple[Tensor, Tensor]:
            if self.per_row and isinstance(plan.pattern, Unstructured):
                plan.pattern = Unstructured(per_row=True)
            matrix = weight.matrix().to(ctx.device)
            if isinstance(plan.pattern, Neurons):
                return matrix, together.mask(weight, matrix.abs().float() * seen.norms())
            return matrix, wanda_mask(matrix, seen.total, plan.sparsity, plan.pattern)

        return prune_layerwise(self, program, ctx, self.samples, SquareSums, prune)
