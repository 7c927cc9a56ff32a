"""The curvature of a layer's squared error, scaled to a unit diagonal and decomposed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_compile.errors import ElsaError
from elsa_compile.passes.prune_sparsegpt import Hessian


@dataclass(frozen=True)
class Curvature:
    """The damped Hessian with a unit diagonal, and what solving with it needs.

    Attributes:
        scale: (K,) float32, roots of the damped Hessian's diagonal; 1 for inputs always zero.
        matrix: (K, K) float32, scaled: matrix[i, j] = H[i, j] / (scale[i] * scale[j]).
        values: (K,) float32, its eigenvalues.
        vectors: (K, K) float32, its eigenvectors, one a column.
        dead: (K,) bool, inputs that are always zero.
    """

    scale: Tensor
    matrix: Tensor
    values: Tensor
    vectors: Tensor
    dead: Tensor


def curvature(hessian: Tensor, damping: float) -> Curvature:
    """Scale and decompose a Hessian, once for all weights that share their inputs.

    Args:
        hessian: (K, K) float, mean of x x^T; not changed.
        damping: added to the diagonal, in units of its mean.

    Raises:
        ElsaError: it holds values that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ElsaError("the inputs' second moments are not finite; check the data and the model")
    # float64: the decomposition is made once, and float32 loses the small eigenvalues.
    damped = hessian.double()
    dead = damped.diagonal() == 0
    damped.diagonal().add_(damping * damped.diagonal().mean())
    damped.diagonal()[dead] = 1.0
    scale = damped.diagonal().sqrt()
    damped = damped / scale / scale[:, None]
    values, vectors = torch.linalg.eigh(damped)
    return Curvature(
        scale.float(), damped.float(), values.clamp(min=0).float(), vectors.float(), dead
    )


class Inputs(Hessian):
    """The Hessian of some inputs, decomposed once for all weights that share them."""

    ready: Curvature | None = None

    def add(self, rows: Tensor) -> None:
        """Take in rows (M, K)."""
        super().add(rows)
        self.ready = None

    def curve(self, damping: float) -> Curvature:
        """See `curvature`; kept until more rows come."""
        if self.ready is None:
            self.ready = curvature(self.total, damping)
        return self.ready
