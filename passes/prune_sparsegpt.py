"""prune-sparsegpt: prune column by column and let the columns to come make up for it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.errors import ElsaError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.coupled_units import refuse_coupled
from elsa_compile.passes.layerwise import prune_layerwise
from elsa_compile.patterns import NM, Block, Pattern, Unstructured, keep_largest, pruned_count
from elsa_compile.program import Program, Weight, WeightPlan


class Hessian:
    """X^T X over the rows seen, the curvature of a layer's squared error, up to a factor."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """Take in rows (M, K)."""
        rows = rows.float()
        count = self.rows + len(rows)
        # A running mean keeps float32 sums near 1 however many tokens there are.
        self.total.mul_(self.rows / count).addmm_(rows.t(), rows, alpha=1 / count)
        self.rows = count


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse: H^-1 = U^T U.

    Row i of U is what compensating the removal of column i needs of the columns behind it
    (SparseGPT, section 3.3), without inverting again for each column.

    Args:
        hessian: (K, K) float, positive semidefinite, no zero on the diagonal.
        damping: added to the diagonal, in units of its mean.

    Raises:
        ElsaError: it is not positive definite even with the damping.
    """
    # float64: with few tokens the matrix has rank far below K, and float32 loses its pivots.
    damped = hessian.double()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    lower, fault = torch.linalg.cholesky_ex(damped)
    if int(fault) == 0:
        upper, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(fault) or not bool(torch.isfinite(upper).all()):
        raise ElsaError(
            "the inputs' second moments are not positive definite; give more data or raise damping"
        )
    factor: Tensor = upper.float()
    return factor


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: Pattern,
    *,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Prune one matrix (SparseGPT, arXiv 2301.00774, algorithm 1).

    Columns are taken in blocks; a block's mask is chosen when its turn comes, from values that
    already compensate for the columns before. The zeros of the blocks add up to exactly the planned
    number.

    Args:
        weight: (N, K) float; not changed.
        hessian: (K, K) float, mean of x x^T over the calibration tokens.
        sparsity: fraction of zeros.
        pattern: which zeros are allowed.
        block_size: columns a block; rounded up to a multiple of an N:M group or a tile's width.
        damping: see `inverse_factor`.

    Returns:
        Values (N, K) float32, zero outside the mask, and the mask (N, K) bool.
    """
    values, hessian = weight.float().clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    values[:, dead] = 0.0
    factor = inverse_factor(hessian, damping)
    mask = torch.ones_like(values, dtype=torch.bool)
    width = {NM: getattr(pattern, "of", 1), Block: getattr(pattern, "cols", 1)}.get(
        type(pattern), 1
    )
    step = -(-block_size // width) * width
    columns = values.shape[1]
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        local = factor[start:stop, start:stop]
        block = values[:, start:stop].clone()
        if not isinstance(pattern, NM):
            scores = (block / local.diagonal()).square()
            mask[:, start:stop] = _block_mask(scores, mask[:, :start], sparsity, pattern)
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            if isinstance(pattern, NM) and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                scores = (block[:, group] / local.diagonal()[group]).square()
                mask[:, start + i : start + i + pattern.of] = keep_largest(scores, pattern.keep)
            lost = torch.where(mask[:, start + i], 0, block[:, i]) / local[i, i]
            block[:, i:] -= lost[:, None] * local[i, i:]
            errors[:, i] = lost
        values[:, start:stop] = block
        values[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.where(mask, values, 0), mask


def _block_mask(scores: Tensor, earlier: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mask (N, B) of one block of columns, so that with the earlier ones the count is exact."""
    rows, width = scores.shape
    done = earlier.shape[1]
    if isinstance(pattern, Block):
        tiles = scores.reshape(rows // pattern.rows, pattern.rows, -1, pattern.cols).sum(dim=(1, 3))
        old = earlier[:: pattern.rows, :: pattern.cols]
        kept = _block_mask(tiles, old, sparsity, Unstructured())
        return kept.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    if isinstance(pattern, Unstructured) and pattern.per_row:
        zeros = pruned_count(done + width, sparsity) - pruned_count(done, sparsity)
        return keep_largest(scores, width - zeros)
    zeros = pruned_count(rows * (done + width), sparsity) - pruned_count(rows * done, sparsity)
    return keep_largest(scores.reshape(1, -1), scores.numel() - zeros).view_as(scores)


@register_pass
@dataclass(frozen=True, kw_only=True)
class PruneSparseGPT(Pass):
    """Zero weights and update the others to make up for it; needs data (arXiv 2301.00774).

    Layer by layer: a layer's inputs are those of the model already pruned before it.
    """

    name: ClassVar[str] = "prune-sparsegpt"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MASKED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLANNED, Fact.EXPORTABLE})
    needs_data: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False  # a second run compensates again, for other inputs

    samples: int = option(128, "calibration samples to use, at most", low=1)
    block_size: int = option(128, "columns whose mask is chosen together", low=1)
    damping: float = option(
        0.01, "added to the Hessian's diagonal, in units of its mean", low=0.0, high=10.0
    )

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Observe, prune with compensation and advance, one segment after another."""
        refuse_coupled(program, self.name)

        def prune(weight: Weight, plan: WeightPlan, seen: Hessian) -> tuple[Tensor, Tensor]:
            matrix = weight.matrix().to(ctx.device)
            try:
                return sparsegpt(
                    matrix,
                    seen.total,
                    plan.sparsity,
                    plan.pattern,
                    block_size=self.block_size,
                    damping=self.damping,
                )
            except ElsaError as error:
                raise ElsaError(f"{self.name}: {weight.name}: {error}") from None

        return prune_layerwise(self, program, ctx, self.samples, Hessian, prune)
