"""repair-degenerate: rows and layers that pruning left with nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.allocation import sparsity_of
from elsa_compile.patterns import Neurons, Unstructured
from elsa_compile.program import Program, Weight, WeightPlan


def refill(
    matrix: Tensor, mask: Tensor, emptied: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, int]:
    """Give empty rows their best entry back; as many of the smallest kept entries go instead.

    Args:
        matrix: (N, K) float, zero outside the mask.
        mask: (N, K) bool, True = kept.
        emptied: (R,) rows, columns and values.

    Returns:
        The new matrix, the new mask, and how many entries went. Each row keeps an entry, so fewer
        go than came when most rows are empty.
    """
    rows, columns, values = emptied
    matrix, new = matrix.clone(), mask.clone()
    new[rows, columns] = True
    matrix[rows, columns] = values.to(matrix.dtype)
    scores = matrix.abs().float().masked_fill(~new, torch.inf)
    # The largest entry of a row never goes.
    best = matrix.abs().float().masked_fill(~new, -1.0).argmax(dim=1)
    scores[torch.arange(len(scores)), best] = torch.inf
    order = scores.reshape(-1).argsort(stable=True)[: len(rows)]
    order = order[torch.isfinite(scores.reshape(-1)[order])]
    new.view(-1)[order] = False
    return torch.where(new, matrix, 0), new, len(order)


@register_pass
@dataclass(frozen=True, kw_only=True)
class RepairDegenerate(Pass):
    """Report weights and rows without any entry left; with restore, give rows their best one back.

    As many of the weight's smallest entries go instead, so that its sparsity stays as planned. Rows
    that went on purpose, by the patterns neurons and heads, are no fault.
    """

    name: ClassVar[str] = "repair-degenerate"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED, Fact.MASKED})
    establishes: ClassVar[frozenset[Fact]] = frozenset()
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact) - {Fact.QUANTIZED}

    restore: bool = option(False, "give each empty row its largest entry back")

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Look at every planned weight."""
        stats = PassStats(counts={"empty_weights": 0, "empty_rows": 0, "empty_columns": 0})
        for weight, plan in program.planned():
            assert plan.mask is not None
            if isinstance(plan.pattern, Neurons):
                continue
            alive = (weight.matrix() != 0).cpu() & plan.mask
            rows = int((~alive.any(dim=1)).sum())
            stats.counts["empty_columns"] += int((~alive.any(dim=0)).sum())
            if not rows:
                continue
            stats.counts["empty_rows"] += rows
            if not bool(alive.any()):
                stats.counts["empty_weights"] += 1
                stats.warnings.append(f"{weight.name} has no entry left: the layer gives nothing")
            else:
                stats.notes.append(f"{weight.name}: {rows} of {len(alive)} rows are empty")
            if self.restore:
                stats.notes.append(f"{weight.name}: {_restore(weight, plan, stats)}")
        return stats


def _restore(weight: Weight, plan: WeightPlan, stats: PassStats) -> str:
    """Refill one weight; what was done or why not."""
    if not isinstance(plan.pattern, Unstructured) or plan.pattern.per_row:
        return f"not restored, since the pattern {plan.pattern} leaves no choice"
    if plan.emptied is None or not len(plan.emptied[0]):
        return "not restored, since nothing is known of what its rows held"
    assert plan.mask is not None
    matrix, mask, gone = refill(weight.matrix().cpu(), plan.mask, plan.emptied)
    came = len(plan.emptied[0])
    weight.write(matrix.to(weight.parameter.device))
    plan.mask, plan.emptied = mask, None
    stats.changed += came
    plan.sparsity = min(plan.sparsity, sparsity_of(int((~mask).sum()), mask.numel()))
    rest = "" if gone == came else f", its sparsity falls to {plan.sparsity:g}"
    return f"{came} rows have their largest entry back, {gone} smallest entries went{rest}"
