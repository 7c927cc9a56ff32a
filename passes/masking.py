"""Writing a pruned matrix back: values, mask and the measured error, in one place."""

import torch
from torch import Tensor

from elsa_compile.pass_base import PassStats
from elsa_compile.program import Program, Weight, WeightPlan


def apply_mask(weight: Weight, plan: WeightPlan, matrix: Tensor, mask: Tensor) -> bool:
    """Store pruned values and their mask.

    Args:
        weight: written in place.
        plan: gets the mask (on the CPU) and the relative error ||W - W0|| / ||W0||.
        matrix: (N, K) float, the new values; entries outside the mask are stored as +0.
        mask: (N, K) bool, True = kept.

    Returns:
        True when the weight or its mask changed.
    """
    before = weight.matrix()
    after = torch.where(mask, matrix, torch.zeros((), dtype=matrix.dtype, device=matrix.device))
    after = after.to(dtype=before.dtype, device=before.device)
    mask = mask.cpu()
    changed = not torch.equal(before, after) or plan.mask is None or not plan.mask.equal(mask)
    norm = float(before.float().norm())
    plan.relative_error = float((after.float() - before.float()).norm()) / norm if norm else 0.0
    plan.mask = mask
    weight.write(after)
    return changed


def finish(program: Program, stats: PassStats) -> PassStats:
    """Count what every pruning pass counts: zeros and entries of the planned weights."""
    zeros = total = 0
    for weight, _ in program.planned():
        zeros += int((weight.parameter == 0).sum())
        total += weight.parameter.numel()
    skipped = sum(plan.skipped is not None for plan in program.plans.values())
    stats.counts |= {"zeros": zeros, "entries": total, "left_dense": skipped}
    return stats
