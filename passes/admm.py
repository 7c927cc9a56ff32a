"""ADMM for sparse training: splitting, projection, schedules, residuals (ELSA, arXiv 2510.01650).

    minimise f(w) subject to w in S, split into w = z with z in S and a scaled dual u

z and u have disjoint supports: after an update a kept entry has z = a and u = 0, a pruned entry has
z = 0 and u = a, with a = w + u. So the one tensor `target` t = z - u holds both, which halves the
state, and the penalty's gradient is lam (w - t) everywhere, without looking at the mask:

    kept:   t = z =  a        w - z + u = w - t
    pruned: t = -u = -a       w - z + u = w + a = w - t

Only the update, once in an interval, needs the mask (one bit an entry). Equality with the textbook
two-tensor form is proved bit for bit in tests/passes/test_admm.py.

All functions are pure unless they end in `_`, which write to their first argument.
"""

import math
from typing import Literal

import numpy
import torch
from torch import Tensor

from elsa_compile.patterns import Pattern, pruned_count

Projection = Literal["objective", "euclidean"]
Schedule = Literal["constant", "linear", "cosine"]

# --- State --------------------------------------------------------------------------------


def initial_target(weight: Tensor, mask: Tensor) -> Tensor:
    """T for z = the projected weight and u = 0.

    Args:
        weight: (N, K) float.
        mask: (N, K) bool, True = kept.
    """
    return torch.where(mask, weight, 0)


def accumulated(weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """A = w + u, from the merged state.

    Args:
        weight: (N, K) float, w.
        target: (N, K) float, t.
        mask: (N, K) bool, of the last update.
    """
    return torch.where(mask, weight, weight - target)


def split(accumulation: Tensor, mask: Tensor, rescale: float = 1.0) -> Tensor:
    """The new t from a and the new mask: z = a where kept, u = a where pruned.

    Args:
        accumulation: (N, K) float, a.
        mask: (N, K) bool, the projection of a.
        rescale: lam_old / lam_new. u shrinks by it when the penalty grows, at the same moment,
            because the unscaled dual lam u must not jump.
    """
    return torch.where(mask, accumulation, -rescale * accumulation)


def pack_mask(mask: Tensor) -> Tensor:
    """Eight entries a byte.

    >>> pack_mask(torch.tensor([True, False, False, False, False, False, False, False, True]))
    tensor([128, 128], dtype=torch.uint8)
    """
    bits = numpy.packbits(mask.reshape(-1).cpu().numpy())
    return torch.from_numpy(bits).to(mask.device)


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`, on the device of `packed`."""
    bits = numpy.unpackbits(packed.cpu().numpy(), count=math.prod(shape)).view(bool)
    return torch.from_numpy(bits).reshape(shape).to(packed.device)


# --- Projection ---------------------------------------------------------------------------


def importance(accumulation: Tensor, moment: Tensor | None, projection: Projection) -> Tensor:
    """Scores whose largest entries the projection keeps.

    The objective-aware projection keeps the largest v a^2: v, Adam's second moment of the
    gradient, is a diagonal Fisher, so this is the least increase of the loss to second order.

    Args:
        accumulation: (N, K) float, a.
        moment: (N, K) float, v; None gives the Euclidean projection.
        projection: "objective" or "euclidean".
    """
    scores = accumulation.float().square()
    if projection == "objective" and moment is not None:
        scores.mul_(moment)
    return scores


def project(scores: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mask (N, K) of the kept entries, an exact number of them; see `Pattern.keep_mask`."""
    return pattern.keep_mask(scores, sparsity)


# --- Schedules ----------------------------------------------------------------------------


def penalty_share(schedule: Schedule, progress: float) -> float:
    """lam(t) / lam_final.

    >>> penalty_share("cosine", 0.5)
    0.5

    Args:
        schedule: "cosine" rises as (1 - cos(pi t / T)) / 2, "linear" as t / T.
        progress: t / T in [0, 1].
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return progress
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def annealed_sparsity(final: float, progress: float, share: float) -> float:
    """Sparsity of the projection at a point of the run.

    Density falls geometrically from 1 to 1 - final while progress goes from 0 to `share`: each
    update then removes the same fraction of what is left.

    >>> round(annealed_sparsity(0.75, 0.25, 0.5), 6)
    0.5
    """
    if share <= 0.0 or progress >= share:
        return final
    density: float = (1.0 - final) ** (max(progress, 0.0) / share)
    return 1.0 - density


def pull(closing: float, interval: int) -> float:
    """Share c of the gap to t that each step closes, so that an interval closes `closing` of it.

    >>> round(pull(0.75, 2), 6)
    0.5
    """
    left: float = (1.0 - closing) ** (1.0 / interval)
    return 1.0 - left


# --- Residuals ----------------------------------------------------------------------------


def primal_residual(weight: Tensor, target: Tensor, mask: Tensor) -> tuple[float, float]:
    """(||w - z||^2, ||w||^2): how far the dense iterate is from the sparse one."""
    gap = torch.where(mask, weight - target, weight).float()
    return float(gap.square().sum()), float(weight.float().square().sum())


def churn(old: Tensor, new: Tensor) -> int:
    """Entries whose mask changed."""
    return int((old ^ new).sum())


__all__ = [
    "Projection",
    "Schedule",
    "accumulated",
    "annealed_sparsity",
    "churn",
    "importance",
    "initial_target",
    "pack_mask",
    "penalty_share",
    "primal_residual",
    "project",
    "pruned_count",
    "pull",
    "split",
    "unpack_mask",
]
