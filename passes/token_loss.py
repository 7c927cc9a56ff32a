"""Cross-entropy and distillation over a vocabulary, with their gradient in one pass.

Autograd would keep five float32 copies of the logits: 2 GB for 2048 tokens and 49152 words. Here
the gradient is computed beside the loss, some rows at a time, in the logits' own type.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ENTRIES = 1 << 22  # of logits that are float32 at a time


def token_loss(
    scores: Tensor, ids: Tensor | None, dense: Tensor | None, share: float
) -> tuple[Tensor, Tensor]:
    """(1 - share) next-token cross-entropy + share KL(dense || scores), in nats.

    Cross-entropy is a mean over ids[:, 1:], the divergence a mean over all rows.

    Args:
        scores: (B, S, V) or (..., V) float, logits.
        ids: (B, S) int64; None: no cross-entropy, `share` must be 1.
        dense: like scores, the dense model's logits for the same inputs; None: `share` must be 0.
        share: weight of the divergence, in [0, 1].

    Returns:
        The loss (), differentiable once, and (3,) float32 without a gradient: cross-entropy of
        scores, cross-entropy of dense, divergence; 0 where there is nothing to compute it from.

    >>> from torch import tensor
    >>> even = torch.zeros(1, 2, 4)
    >>> float(token_loss(even, tensor([[0, 3]]), None, 0.0)[0])  # log 4
    1.3862943649291992
    """
    wanted = scores.new_full(scores.shape[:-1], -1, dtype=torch.int64)
    if ids is not None:
        wanted[:, :-1] = ids[:, 1:]
    flat = scores.reshape(-1, scores.shape[-1])
    other = None if dense is None else dense.reshape(flat.shape)
    found: tuple[Tensor, Tensor]
    found = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        flat, wanted.reshape(-1), other, share
    )
    return found


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, wanted: Tensor, dense: Tensor | None, share: float
    ) -> tuple[Tensor, Tensor]:
        rows, words = scores.shape
        count = max(1, int((wanted >= 0).sum()))
        gradient = torch.empty_like(scores) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(3, dtype=torch.float64, device=scores.device)
        step = max(1, _ENTRIES // words)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            sums += _chunk(
                scores[part],
                wanted[part],
                None if dense is None else dense[part],
                None if gradient is None else gradient[part],
                ((1.0 - share) / count, share / rows),
            )
        costs = (sums / torch.tensor([count, count, rows], device=sums.device)).float()
        ctx.gradient = gradient
        ctx.mark_non_differentiable(costs)
        return (1.0 - share) * costs[0] + share * costs[2], costs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.gradient * outer.to(ctx.gradient.dtype), None, None, None


def _chunk(
    scores: Tensor,
    wanted: Tensor,
    dense: Tensor | None,
    gradient: Tensor | None,
    weights: tuple[float, float],
) -> Tensor:
    """Sums over some rows: both cross-entropies and the divergence, (3,) float64."""
    valid = wanted >= 0
    place = wanted.clamp_min(0)[:, None]
    logs = scores.float().log_softmax(-1)
    sums = torch.zeros(3, dtype=torch.float64, device=scores.device)
    sums[0] = -(logs.gather(1, place)[:, 0] * valid).sum()
    hard = (valid * weights[0])[:, None]
    slope = None
    if dense is not None:
        theirs = dense.float().log_softmax(-1)
        sums[1] = -(theirs.gather(1, place)[:, 0] * valid).sum()
        chances = theirs.exp()
        sums[2] = torch.linalg.vecdot(chances, theirs.sub_(logs)).sum()
        slope = chances.mul_(-weights[1])
    if gradient is not None:
        # Softmax minus targets, each weighted.
        own = logs.exp_().mul_(hard + (weights[1] if dense is not None else 0.0))
        own.scatter_add_(1, place, -hard)
        gradient.copy_(own if slope is None else own.add_(slope))
    return sums
