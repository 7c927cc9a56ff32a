"""Orders of columns that let an N:M or a block pattern keep more.

An N:M pattern keeps the best N of each M neighbours, so it loses least when large and small columns
are mixed evenly; a block pattern keeps whole tiles, so it loses least when large ones stand
together. What is kept is measured as energy: the sum of squares (channel permutations for N:M
sparsity: Pool and Yu, NeurIPS 2021).

>>> deal(torch.tensor([4.0, 3.0, 2.0, 1.0]), 2).tolist()  # groups of 2: 4 with 1, 3 with 2
[0, 3, 1, 2]
"""

import torch
from torch import Tensor

from elsa_compile.patterns import Pattern


def kept_energy(matrix: Tensor, pattern: Pattern, sparsity: float) -> float:
    """Sum of squares of what the pattern keeps of (N, K) when the largest entries stay."""
    mask = pattern.keep_mask(matrix.abs().float(), sparsity)
    return float(matrix.double().square()[mask].sum())


def deal(energy: Tensor, of: int) -> Tensor:
    """Mix columns evenly: sorted by energy, dealt to the groups there and back.

    Args:
        energy: (U,) float, of each column; U is a multiple of `of`.
        of: columns in a group.

    Returns:
        (U,) int64: the column that comes to each place. It depends on the columns alone, not on
        their present order, unless two have the same energy.
    """
    groups = len(energy) // of
    rows = energy.argsort(descending=True, stable=True).reshape(of, groups).clone()
    rows[1::2] = rows[1::2].flip(1)
    return rows.t().reshape(-1)


def gather(energy: Tensor) -> Tensor:
    """Put the large ones first, so that tiles are large or small throughout; (U,) int64."""
    return energy.argsort(descending=True, stable=True)


def exchange(
    squares: Tensor, keep: int, of: int, rounds: int, generator: torch.Generator
) -> Tensor:
    """Swap columns between groups as long as it raises what an N:M pattern keeps.

    In each round the groups are paired at random, and of all swaps of two columns of a pair the
    best is made if it gains.

    Args:
        squares: (N, K) float, squared entries; K is a multiple of `of`.
        keep: N of N:M.
        of: M of N:M.
        rounds: how often groups are paired.
        generator: of the pairs.

    Returns:
        (K,) int64: the column that comes to each place.
    """
    order = torch.arange(squares.shape[1])
    groups = len(order) // of
    for _ in range(rounds if groups > 1 else 0):
        pairs = torch.randperm(groups, generator=generator)[: groups // 2 * 2].reshape(-1, 2)
        places = pairs[:, :, None] * of + torch.arange(of)  # (P, 2, M)
        values = squares[:, order[places].reshape(-1)].reshape(len(squares), *places.shape)
        one, other = values[:, :, 0], values[:, :, 1]  # (N, P, M)
        now = _best(one, keep).sum(dim=0) + _best(other, keep).sum(dim=0)
        gain = _with_swaps(one, other, keep) + _with_swaps(other, one, keep).transpose(1, 2)
        best, swap = (gain - now[:, None, None]).reshape(len(pairs), -1).max(dim=1)
        # Sums in another order differ in the last digits: a gain must be more than that.
        chosen = (best > 1e-6 * now).nonzero().reshape(-1)
        a = places[chosen, 0, swap[chosen] // of]
        b = places[chosen, 1, swap[chosen] % of]
        order[a], order[b] = order[b].clone(), order[a].clone()
    return order


def _best(values: Tensor, keep: int) -> Tensor:
    """Sum of the `keep` largest of the last dimension, float64."""
    return values.topk(keep, dim=-1, sorted=False).values.sum(dim=-1, dtype=torch.float64)


def _with_swaps(group: Tensor, other: Tensor, keep: int) -> Tensor:
    """What a group keeps when its column i gives way to column j of another one.

    Args:
        group: (N, P, M).
        other: (N, P, M).
        keep: the best so many stay.

    Returns:
        (P, M, M) float64, by i and j. The best of the rest and j are the best keep - 1 of the rest
        and the larger of the next one and j.
    """
    width = group.shape[2]
    result = group.new_zeros(group.shape[1], width, width, dtype=torch.float64)
    for i in range(width):
        rest = torch.cat([group[:, :, :i], group[:, :, i + 1 :]], dim=2)
        best = rest.topk(keep, dim=-1).values
        sure = best[..., :-1].sum(dim=(0, 2), dtype=torch.float64)
        for j in range(width):
            larger = torch.maximum(best[..., -1], other[:, :, j])
            result[:, i, j] = sure + larger.sum(dim=0, dtype=torch.float64)
    return result
