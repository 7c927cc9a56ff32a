"""The packed form of a weight: one bit an entry, and the values of the set bits.

    mask    (ceil(entries / 8),) uint8: bit i % 8 of byte i // 8 belongs to entry i, row after row;
            bits behind the last entry are 0
    values  the fill value, which all unset entries have (zero, of an ordinary weight), then the
            values of the set bits in the order of their entries, none of which is the fill value

Values are compared as bits: -0.0 is not 0.0, and a NaN is its own payload. So there is exactly one
packed form of a weight, and it gives back every bit. The format is in docs/packed-format.md.

Example: [[0, 5, 0], [7, 0, 0]] -> mask [0b001010], values [0, 5, 7].
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.onnx_tensors import Malformed

Array = NDArray[Any]
# Positions in the list of values are int32 in the decoding graph.
MAX_ENTRIES = 1 << 31
_BLOCK = 1 << 23  # entries looked at together, a multiple of 8
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def as_bits(values: Array) -> Array:
    """Values of 1, 2, 4 or 8 bytes as whole numbers of the same bits; a view."""
    return values.view(_BITS[values.dtype.itemsize])


def blocks(dense: Array) -> Iterator[Array]:
    """The entries of an array, row after row, some millions at a time; only those are copied.

    Each part but the last has a multiple of 8 entries.
    """
    if dense.ndim < 2 or dense.flags.c_contiguous:
        flat = dense.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            yield np.asarray(flat[start : start + _BLOCK])
        return
    # A transposed view: whole rows, eight of them at least.
    columns = int(np.prod(dense.shape[1:], dtype=np.int64))
    step = max(8, _BLOCK // max(columns, 1) // 8 * 8)
    for start in range(0, len(dense), step):
        yield np.ascontiguousarray(dense[start : start + step]).reshape(-1)


def without_negative_zeros(part: Array) -> Array:
    """The same floats with +0.0 for -0.0; whole numbers as they are."""
    if part.dtype.kind in "iu":
        return part
    bits = as_bits(part)
    sign = np.array(1 << 8 * part.dtype.itemsize - 1, bits.dtype)
    return np.where(bits == sign, np.zeros((), bits.dtype), bits).view(part.dtype)


def encode(
    dense: Array, fill: Array | None = None, drop_negative_zeros: bool = False
) -> tuple[NDArray[np.uint8], Array]:
    """Mask and values of a weight.

    Args:
        dense: of any shape, entries of 1, 2, 4 or 8 bytes.
        fill: one value; None for zero.
        drop_negative_zeros: store -0.0 as +0.0.

    Raises:
        Malformed: more than 2^31 entries.
    """
    if dense.size > MAX_ENTRIES:
        raise Malformed(f"it has {dense.size} entries, and the packed form ends at {MAX_ENTRIES}")
    first = np.zeros(1, dense.dtype) if fill is None else np.asarray(fill, dense.dtype).reshape(1)
    masks: list[Array] = []
    values: list[Array] = [first]
    for part in blocks(dense):
        if drop_negative_zeros:
            part = without_negative_zeros(part)
        kept = as_bits(part) != as_bits(first)
        masks.append(np.packbits(kept, bitorder="little"))
        values.append(part[kept])
    mask = np.concatenate(masks) if masks else np.zeros(0, np.uint8)
    return mask, np.concatenate(values)


def decode(mask: NDArray[np.uint8], values: Array, shape: tuple[int, ...]) -> Array:
    """The dense weight, bit for bit.

    Args:
        mask: see above; checked by `check` before.
        values: see above.
        shape: of the weight.
    """
    entries = int(np.prod(shape, dtype=np.int64))
    dense = np.empty(entries, values.dtype)
    dense[:] = values[0]
    at = 1
    for start in range(0, entries, _BLOCK):
        part = mask[start // 8 : (start + _BLOCK) // 8]
        count = min(_BLOCK, entries - start)
        where = np.flatnonzero(np.unpackbits(part, count=count, bitorder="little"))
        dense[start + where] = values[at : at + where.size]
        at += where.size
    return dense.reshape(shape)


def count_bits(mask: NDArray[np.uint8]) -> int:
    """Set bits of a mask."""
    step = _BLOCK // 8
    return sum(
        int(np.count_nonzero(np.unpackbits(mask[start : start + step])))
        for start in range(0, mask.size, step)
    )


def check(
    mask: NDArray[np.uint8], values: Array, count: int, shape: tuple[int, ...], what: str
) -> int:
    """The set bits of a packed weight that may hold anything.

    Args:
        mask: uint8.
        values: as they lie in the file, int4 two to a byte.
        count: how many they are.
        shape: what the node says.
        what: how to call it in an error.

    Raises:
        Malformed: with the first thing that is wrong.
    """
    entries = int(np.prod(shape, dtype=np.int64))
    if mask.shape != (-(-entries // 8),):
        raise Malformed(
            f"{what} has a mask of shape {list(mask.shape)} for {entries} entries, wanted "
            f"[{-(-entries // 8)}]"
        )
    if entries % 8 and mask[-1] >> entries % 8:
        raise Malformed(f"{what} has a bit behind its last entry")
    kept = count_bits(mask)
    if count != kept + 1:
        raise Malformed(
            f"{what} has {count} values for {kept} set bits, wanted {kept + 1}: the fill value "
            "and one for each"
        )
    bits = as_bits(values)
    for start in range(1, len(bits), _BLOCK):
        if (bits[start : start + _BLOCK] == bits[0]).any():
            raise Malformed(f"{what} has a value that equals its fill value, which needs no bit")
    return kept


def packed_nbytes(entries: int, kept: int, value_bits: int) -> int:
    """Bytes of mask and values by the formula: a bit an entry, the fill value, the values.

    Example: 64 entries of which 8 are kept, float32: 8 + 9 * 4 = 44.
    """
    return -(-entries // 8) + -(-(kept + 1) * value_bits // 8)
