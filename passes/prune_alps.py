"""prune-alps: search each weight's support by ADMM on its layer's error, then solve for its values.

ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831). With H = X^T X and B = W0 H the problem is
min ||X (W - W0)^T||^2 over matrices with k nonzeros; W is split from a sparse copy D.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.errors import ElsaError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.coupled_units import refuse_coupled
from elsa_compile.passes.curvature import Curvature, Inputs
from elsa_compile.passes.layerwise import prune_layerwise
from elsa_compile.patterns import Pattern
from elsa_compile.program import Program, Weight, WeightPlan

RHO_START = 0.1
RHO_EVERY = 3  # iterations between two looks at the support
# Section 3.2: rho grows by a factor that depends on the share of the support that changed.
RHO_STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
RHO_WAITING = 2.0  # while nothing has changed yet rho is far too small for this matrix
RHO_END = 1e6  # W and D agree to the last bit of float32 long before


def next_rho(rho: float, changed: int, kept: int, moved: bool) -> float:
    """The penalty after `changed` entries of a support of `kept` were exchanged.

    >>> next_rho(1.0, 20, 100, True), next_rho(1.0, 1, 100, True), next_rho(1.0, 0, 100, False)
    (1.3, 1.2, 2.0)
    """
    if changed == 0:
        return rho if moved else rho * RHO_WAITING
    share = changed / max(kept, 1)
    return rho * next(factor for least, factor in RHO_STEPS if share >= least)


def admm(
    weight: Tensor, curve: Curvature, sparsity: float, pattern: Pattern, iterations: int
) -> tuple[Tensor, Tensor]:
    """Sparse values and their support, in the scaled space (algorithm 1).

    It ends when the support stays the same between two looks after having changed.

    Args:
        weight: (N, K) float32, already times `curve.scale`.
        curve: see `curvature`.
        sparsity: fraction of zeros.
        pattern: which zeros are allowed; its `keep_mask` is the projection.
        iterations: at most.

    Returns:
        Values (N, K) float32, zero outside the mask, and the mask (N, K) bool.
    """
    wanted = weight @ curve.matrix
    sparse, dual = weight, torch.zeros_like(weight)
    last = mask = pattern.keep_mask(weight.square(), sparsity)
    rho, moved = RHO_START, False
    for step in range(1, iterations + 1):
        right = (wanted - dual + rho * sparse) @ curve.vectors
        dense = (right / (curve.values + rho)) @ curve.vectors.t()
        shifted = dense + dual / rho
        mask = pattern.keep_mask(shifted.square(), sparsity)
        sparse = torch.where(mask, shifted, 0)
        dual = dual + rho * (dense - sparse)
        if step % RHO_EVERY == 0:
            changed = int((mask ^ last).sum())
            if (changed == 0 and moved) or rho > RHO_END:
                break
            rho = next_rho(rho, changed, int(mask.sum()), moved)
            moved, last = moved or changed > 0, mask
    return sparse, mask


def solve_on_support(
    start: Tensor, wanted: Tensor, matrix: Tensor, mask: Tensor, iterations: int
) -> Tensor:
    """Best values on a fixed support, by conjugate gradients (algorithm 2).

    Each output is a system of its own with its own step length, all advance together. The matrix
    has a unit diagonal, so the diagonal preconditioner of the paper is the identity.

    Args:
        start: (N, K) float, zero outside the mask.
        wanted: (N, K) float, right-hand sides W0 H.
        matrix: (K, K) float, H with a unit diagonal.
        mask: (N, K) bool, True = kept.
        iterations: of conjugate gradients.

    Returns:
        (N, K) float, zero outside the mask; its error is at most that of `start`.
    """
    values = start.clone()
    residual = torch.where(mask, wanted - values @ matrix, 0)
    direction = residual
    square = residual.square().sum(dim=1, keepdim=True)
    enough = 1e-12 * wanted.square().sum(dim=1, keepdim=True)  # float32 gets no further
    for _ in range(iterations):
        active = square > enough
        if not bool(active.any()):
            break
        image = torch.where(mask, direction @ matrix, 0)
        bend = (direction * image).sum(dim=1, keepdim=True)
        length = torch.where(active & (bend > 0), square / bend, 0)
        values = values + length * direction
        residual = residual - length * image
        before, square = square, residual.square().sum(dim=1, keepdim=True)
        direction = residual + torch.where(active, square / before, 0) * direction
    return values


def alps(
    weight: Tensor,
    curve: Curvature,
    sparsity: float,
    pattern: Pattern,
    *,
    iterations: int = 300,
    refinements: int = 10,
) -> tuple[Tensor, Tensor]:
    """Prune one matrix: support by ADMM, values by conjugate gradients.

    Args:
        weight: (N, K) float; not changed.
        curve: of the weight's inputs, see `curvature`.
        sparsity: fraction of zeros.
        pattern: which zeros are allowed.
        iterations: of ADMM, at most.
        refinements: iterations of conjugate gradients.

    Returns:
        Values (N, K) float32, zero outside the mask, and the mask (N, K) bool.
    """
    scaled = torch.where(curve.dead, 0, weight.float() * curve.scale)
    values, mask = admm(scaled, curve, sparsity, pattern, iterations)
    values = solve_on_support(values, scaled @ curve.matrix, curve.matrix, mask, refinements)
    return torch.where(mask, values / curve.scale, 0), mask


@register_pass
@dataclass(frozen=True, kw_only=True)
class PruneALPS(Pass):
    """Search the best zeros of each layer by ADMM, then solve for the rest (arXiv 2406.07831).

    Needs data. Slower than prune-sparsegpt and better from about 60 % zeros on. Layer by layer: a
    layer's inputs are those of the model already pruned before it.
    """

    name: ClassVar[str] = "prune-alps"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MASKED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLANNED, Fact.EXPORTABLE})
    needs_data: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False  # a second run compensates again, for other inputs

    samples: int = option(128, "calibration samples to use, at most", low=1)
    iterations: int = option(300, "iterations of ADMM for each weight, at most", low=1)
    refinements: int = option(10, "iterations of conjugate gradients on the support", low=0)
    damping: float = option(
        0.01, "added to the Hessian's diagonal, in units of its mean", low=0.0, high=10.0
    )

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Observe, prune and advance, one segment after another."""
        refuse_coupled(program, self.name)

        def prune(weight: Weight, plan: WeightPlan, seen: Inputs) -> tuple[Tensor, Tensor]:
            try:
                curve = seen.curve(self.damping)
            except ElsaError as error:
                raise ElsaError(f"{self.name}: {weight.name}: {error}") from None
            return alps(
                weight.matrix().to(ctx.device),
                curve,
                plan.sparsity,
                plan.pattern,
                iterations=self.iterations,
                refinements=self.refinements,
            )

        return prune_layerwise(self, program, ctx, self.samples, Inputs, prune)
