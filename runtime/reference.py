"""The truth of each kernel in numpy: what is stored, what is multiplied, summed in float64.

Nothing here is fast, and nothing here shares code with the native library.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.errors import UserInputError

DTYPES = ("float32", "bfloat16", "float16", "int8")
FORMATS = ("bitmap", "sliced")
_CHUNK, _GROUP, _SLICE, _ALIGN = 64, 4, 16, 64


def round_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest bfloat16, ties to even; finite values only.

    >>> float(round_bfloat16(np.float32([1.00390625]))[0])
    1.0
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def quantise_rows(
    weight: NDArray[np.float32], scales: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8, one scale a row; zero stays zero.

    Args:
        weight: (N, K).
        scales: (N,), or None: a row's largest magnitude / 127.

    Returns:
        (N, K) int8 and (N,) scales.
    """
    if scales is None:
        scales = np.abs(weight).max(axis=1).astype(np.float32) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / scales
    inverse[~np.isfinite(inverse)] = 0
    codes = np.rint(weight * inverse[:, None]).clip(-128, 127).astype(np.int8)
    return codes, scales


def stored(weight: NDArray[np.float32], dtype: str) -> NDArray[np.float64]:
    """The values a packed weight of this type really holds, (N, K).

    Raises:
        UserInputError: an unknown type.
    """
    weight = np.asarray(weight, dtype=np.float32)
    if dtype == "float32":
        return weight.astype(np.float64)
    if dtype == "bfloat16":
        return round_bfloat16(weight).astype(np.float64)
    if dtype == "float16":
        return weight.astype(np.float16).astype(np.float64)
    if dtype == "int8":
        codes, scales = quantise_rows(weight)
        return codes.astype(np.float64) * scales[:, None].astype(np.float64)
    raise UserInputError(f"value type {dtype!r} is unknown, wanted one of {', '.join(DTYPES)}")


def levels_of(codes: NDArray[np.int8]) -> int:
    """Largest activation, as an integer, with which no row's sum of products leaves 32 bits.

    >>> levels_of(np.full((1, 1024), -128, np.int8))
    16383
    """
    largest = int(np.abs(codes.astype(np.int64)).sum(axis=1).max(initial=1))
    return min(32767, (2**31 - 1) // largest)


def quantise_tokens(
    x: NDArray[np.float32], levels: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Activations (M, K) as integers, one scale a token: its largest magnitude / levels."""
    largest = np.abs(x).max(axis=1).astype(np.float32)
    scales = largest / np.float32(levels)
    with np.errstate(divide="ignore"):
        inverse = np.float32(levels) / largest
    inverse[~np.isfinite(inverse)] = 0
    # The product in float32, as the kernels take it: a tie may round either way otherwise.
    return np.rint(x * inverse[:, None]).astype(np.int32), scales


def matmul(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    """Activations x (M, K) times weight (N, K), transposed: (M, N), summed in float64."""
    product: NDArray[np.float64] = x.astype(np.float64) @ weight.astype(np.float64).T
    return product


def matmul_int8(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """The same with int8 weights and rounded activations; the sum of products is exact."""
    codes, scales = quantise_rows(weight)
    tokens, token_scales = quantise_tokens(x, levels_of(codes))
    sums = tokens.astype(np.int64) @ codes.astype(np.int64).T
    result: NDArray[np.float64] = (
        sums * token_scales[:, None].astype(np.float64) * scales.astype(np.float64)
    )
    return result


def rotate(x: NDArray[Any], cosines: NDArray[Any], sines: NDArray[Any]) -> NDArray[np.float64]:
    """Rotary position embedding of heads x (B, H, S, D) by angles (B or 1, S, half), in float64.

    Element i < half turns with element half + i; those from 2 half on stay (Su et al.,
    arXiv 2104.09864, in the halves of ONNX's RotaryEmbedding with interleaved = 0).
    """
    turned = x.astype(np.float64)
    half = cosines.shape[-1]
    c, s = cosines[:, None].astype(np.float64), sines[:, None].astype(np.float64)
    first, second = turned[..., :half].copy(), turned[..., half : 2 * half].copy()
    turned[..., :half] = c * first - s * second
    turned[..., half : 2 * half] = s * first + c * second
    return turned


def attention(
    q: NDArray[Any],
    keys: NDArray[Any],
    values: NDArray[Any],
    scale: float,
    mask: NDArray[Any] | None = None,
    causal: int | None = None,
) -> NDArray[np.float64]:
    """softmax(scale q k' + mask) v in float64; ONNX's Attention without its cache.

    Args:
        q: (B, H, S, D).
        keys: (B, G, T, D), of heads that H / G query heads share.
        values: (B, G, T, E).
        scale: of the scores.
        mask: bool, True where a key is seen, or what is added; broadcast to (B, H, S, T).
        causal: tokens of the past, when query s sees keys up to causal + s.

    Returns:
        (B, H, S, E); zeros for a query that sees no key.
    """
    shared = q.shape[1] // keys.shape[1]
    k, v = (np.repeat(x.astype(np.float64), shared, axis=1) for x in (keys, values))
    scores = scale * (q.astype(np.float64) @ k.swapaxes(-1, -2))
    if mask is not None:
        scores = scores + (np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask)
    if causal is not None:
        queries, count = scores.shape[-2:]
        seen = np.arange(count) <= causal + np.arange(queries)[:, None]
        scores = np.where(seen, scores, -np.inf)
    most = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(most), most, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    found: NDArray[np.float64] = (weights @ v) / np.where(total == 0.0, 1.0, total)
    return found


def error_bound(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    """Most a float32 sum of K products in any order may be off, (M, N).

    (K + 2) roundings of at most 2^-24 each, times the sum of magnitudes (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), with a factor of 1.01 for the second order.
    """
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    bound: NDArray[np.float64] = magnitude * ((x.shape[1] + 2) * 2.0**-24 * 1.01) + 1e-37
    return bound


def decode(data: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The dense weight (N, K) in sound packed bytes; docs/kernels.md describes the two formats."""
    raw = data.tobytes()
    magic, version, form, kind, rows, columns, _, stream_bytes = struct.unpack_from(
        "<4sHBBIIQQ", raw
    )
    if magic != b"ELSP" or version != 2:
        raise UserInputError("these bytes are no packed weight of version 2")
    units = -(-rows // (_GROUP if form == 1 else _SLICE))
    lengths = [
        (units + 1) * 8,
        units * 4 if form == 2 else 0,
        rows * 4 if form == 2 else 0,
        rows * 4 if kind == 3 else 0,
        rows * 4 if kind == 3 else 0,
    ]
    places, end = [], _ALIGN
    for length in lengths:
        places.append(end)
        end = _aligned(end + length)
    offsets = np.frombuffer(raw, np.uint64, units + 1, places[0]).astype(int)
    stream = raw[end : end + stream_bytes]
    dense = np.zeros((rows, columns), dtype=np.float64)
    if form == 1:
        _decode_groups(stream, offsets, kind, dense)
    else:
        steps = np.frombuffer(raw, np.uint32, units, places[1]).astype(int)
        order = np.frombuffer(raw, np.uint32, rows, places[2]).astype(int)
        _decode_slices(stream, offsets, steps, order, kind, dense)
    if kind == 3:
        dense *= np.frombuffer(raw, np.float32, rows, places[3]).astype(np.float64)[:, None]
    return dense


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _values(stream: bytes, start: int, count: int, kind: int) -> NDArray[np.float64]:
    if kind == 1:
        halves = np.frombuffer(stream, np.uint16, count, start).astype(np.uint32)
        return (halves << 16).view(np.float32).astype(np.float64)
    dtype = {0: np.float32, 2: np.float16, 3: np.int8}[kind]
    return np.frombuffer(stream, dtype, count, start).astype(np.float64)


def _width(kind: int) -> int:
    return (4, 2, 2, 1)[kind]


def _decode_groups(
    stream: bytes, offsets: NDArray[Any], kind: int, dense: NDArray[np.float64]
) -> None:
    rows, columns = dense.shape
    chunks = -(-columns // _CHUNK)
    for group, start in enumerate(offsets[:-1]):
        at = start
        for chunk in range(chunks):
            words = np.frombuffer(stream, np.uint8, _GROUP * 8, at).reshape(_GROUP, 8)
            bits = np.unpackbits(words, axis=1, bitorder="little")
            at += _GROUP * 8
            for row in range(_GROUP):
                places = np.flatnonzero(bits[row])
                if places.size:
                    values = _values(stream, at, places.size, kind)
                    dense[group * _GROUP + row, chunk * _CHUNK + places] = values
                    at += places.size * _width(kind)


def _decode_slices(
    stream: bytes,
    offsets: NDArray[Any],
    steps: NDArray[Any],
    order: NDArray[Any],
    kind: int,
    dense: NDArray[np.float64],
) -> None:
    for slice_, (start, count) in enumerate(zip(offsets[:-1], steps, strict=True)):
        deltas = np.frombuffer(stream, np.uint8, count * _SLICE, start).reshape(count, _SLICE)
        columns = np.cumsum(deltas.astype(int), axis=0)
        at = start + _aligned(count * _SLICE)
        values = _values(stream, at, count * _SLICE, kind).reshape(count, _SLICE)
        for lane, row in enumerate(order[slice_ * _SLICE : (slice_ + 1) * _SLICE]):
            np.add.at(dense[row], columns[:, lane], values[:, lane])
