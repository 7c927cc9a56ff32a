"""Writing a pruned matrix back: values, mask and the measured error, in one place."""

import torch
from torch import Tensor

from elsa_compile.pass_base import PassStats
from elsa_compile.program import Program, Weight, WeightPlan


def apply_mask(weight: Weight, plan: WeightPlan, matrix: Tensor, mask: Tensor) -> bool:
    """Store pruned values and their mask.

    Args:
        weight: written in place.
        plan: gets the mask (on the CPU), the relative error ||W - W0|| / ||W0||, and the largest
            entry of each row that is emptied.
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
    plan.emptied = _emptied(before.cpu(), mask, plan.emptied)
    weight.write(after)
    return changed


def _emptied(
    before: Tensor, mask: Tensor, known: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(row, column, value) of the best entry of each empty row; what is known stays known."""
    empty = ~mask.any(dim=1)
    if not bool(empty.any()):
        return None
    held = (before != 0).any(dim=1)
    rows = (empty & held).nonzero().reshape(-1)
    columns = before[rows].abs().argmax(dim=1)
    found = (rows, columns, before[rows, columns].clone())
    if known is not None:
        still = (empty & ~held)[known[0]]
        found = tuple(torch.cat([a, b[still]]) for a, b in zip(found, known, strict=True))  # type: ignore[assignment]
    return found


def scale_emptied(
    plan: WeightPlan | None, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Let what emptied rows held follow a weight whose rows (N,) or columns (K,) are scaled."""
    if plan is None or plan.emptied is None:
        return
    at_rows, at_columns, values = plan.emptied
    for factor, places in ((rows, at_rows), (columns, at_columns)):
        if factor is not None:
            values = values * factor.cpu()[places].to(values.dtype)
    plan.emptied = (at_rows, at_columns, values)


def finish(program: Program, stats: PassStats) -> PassStats:
    """Count what every pruning pass counts: zeros and entries of the planned weights."""
    zeros = total = 0
    for weight, _ in program.planned():
        zeros += int((weight.parameter == 0).sum())
        total += weight.parameter.numel()
    skipped = sum(plan.skipped is not None for plan in program.plans.values())
    stats.counts |= {"zeros": zeros, "entries": total, "left_dense": skipped}
    return stats
