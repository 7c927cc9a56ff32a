"""How much each of several weights keeps when one threshold on their entries' costs decides."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elsa_compile.passes.allocation import Pieces
from elsa_compile.patterns import Block, Pattern, Unstructured

_INFINITY_BITS = 0x7F800000  # of float32


def piece_scores(scores: Tensor, pattern: Pattern) -> Tensor:
    """What each piece of a weight costs, a mean per entry, ascending.

    Args:
        scores: (N, K) float, cost of each entry, not negative.
        pattern: unstructured: pieces are entries; a block: tiles; row: the j-th cheapest entries of
            all rows together are piece j.

    Returns:
        (pieces,) float32.
    """
    if isinstance(pattern, Block):
        rows, columns = scores.shape
        tiles = scores.reshape(
            rows // pattern.rows, pattern.rows, columns // pattern.cols, pattern.cols
        )
        return tiles.float().mean(dim=(1, 3)).flatten().sort().values
    if isinstance(pattern, Unstructured) and pattern.per_row:
        return scores.float().sort(dim=1).values.mean(dim=0)
    return scores.float().flatten().sort().values


def kept_bounds(
    parts: Sequence[Pieces], density: float, floor: float, cap: float
) -> tuple[list[int], list[int]]:
    """Fewest and most pieces to keep of each weight.

    >>> kept_bounds([Pieces(100, 1)], 0.1, 0.5, 3.0)
    ([5], [30])

    Args:
        parts: pieces of each weight.
        density: mean kept share.
        floor: least density of a weight, in units of the mean.
        cap: largest, likewise.
    """
    slack = 1e-6  # 3 * 0.1 * 1000 is a little over 300 in binary
    least = [max(1, math.floor(floor * density * p.count + slack)) for p in parts]
    most = [min(p.count, math.ceil(cap * density * p.count - slack)) for p in parts]
    return least, [max(low, high) for low, high in zip(least, most, strict=True)]


def kept_pieces(
    ascending: Sequence[Tensor],
    sizes: Sequence[int],
    total: int,
    least: Sequence[int],
    most: Sequence[int],
) -> list[int]:
    """Pieces to keep of each weight: those above one threshold, within bounds, `total` entries.

    The threshold is found by bisection over the bits of a float32, which are ordered as the numbers
    are; what is missing then is tied with it, and is given out in order.

    Args:
        ascending: for each weight its pieces' costs, ascending, float32, not negative.
        sizes: entries in a piece of each weight.
        total: entries to keep; met exactly when sizes are 1 and bounds allow it.
        least: fewest pieces to keep of each weight.
        most: most pieces.
    """

    def kept(bits: int) -> list[int]:
        threshold = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        found = []
        for scores, low, high in zip(ascending, least, most, strict=True):
            below = int(torch.searchsorted(scores, threshold.to(scores.device)))
            found.append(min(max(len(scores) - below, low), high))
        return found

    def entries(counts: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(counts, sizes, strict=True))

    low, high = -1, _INFINITY_BITS  # kept(high) <= total < kept(low), as far as bounds allow
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if entries(kept(middle)) <= total else (middle, high)
    counts = kept(high)
    missing = total - entries(counts)
    ties = kept(low) if low >= 0 else list(most)
    for i, (count, tied) in enumerate(zip(counts, ties, strict=True)):
        more = min(tied - count, missing // sizes[i])
        counts[i] += more
        missing -= more * sizes[i]
    return counts
