"""ONNX initializers as protobuf bytes, written piece by piece.

onnx's own classes would hold every weight twice more (in the message and in its serialised form)
and end at 2 GiB while building. The wire format needs four rules (protobuf's encoding guide): a
field is a varint key (number << 3 | wire type) and a value; a message is a field of known length;
packed numbers are one field; varints are 7 bits a byte, lowest first, high bit = more to come.
So a message here is a list of parts, bytes or data still to be produced, whose length is known
before anything is written.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import SparseTensorProto, TensorProto

from elsa_compile.weight_store import Array, StoredWeight, tensor_header

# Field numbers of onnx.proto.
MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
GRAPH_SPARSE_INITIALIZER = 15
_SPARSE_VALUES = 1
_SPARSE_INDICES = 2
_TENSOR_INT64_DATA = 7
_TENSOR_RAW_DATA = 9

_LENGTH_DELIMITED = 2
_MAX_VARINT_BYTES = 10


@dataclass(frozen=True)
class Payload:
    """Data of a known length in bytes, produced when written."""

    length: int
    chunks: Callable[[], Iterator[Array]]


Part = bytes | Payload


@dataclass(frozen=True)
class External:
    """A place in the file beside the model: name, offset and length in bytes."""

    location: str
    offset: int
    length: int


def length_of(parts: Sequence[Part]) -> int:
    """Bytes that the parts will take."""
    return sum(part.length if isinstance(part, Payload) else len(part) for part in parts)


def varint(value: int) -> bytes:
    """One non-negative number. 300 -> ac 02."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(number: int, parts: Sequence[Part]) -> list[Part]:
    """The parts as one length-delimited field of the message around them."""
    key = number << 3 | _LENGTH_DELIMITED
    return [varint(key) + varint(length_of(parts)), *parts]


def varint_lengths(indices: NDArray[np.int64]) -> int:
    """Bytes of the sorted, non-negative indices as varints."""
    total = len(indices)
    for bits in range(7, 63, 7):
        longer = len(indices) - int(np.searchsorted(indices, 1 << bits))
        if not longer:
            break
        total += longer
    return total


def pack_varints(indices: NDArray[np.int64]) -> Array:
    """The sorted, non-negative indices as varints: uint8 (bytes,).

    Sorted numbers come in runs of equal length, and a run is a rectangle of bytes.
    """
    runs = []
    start = 0
    for width in range(1, _MAX_VARINT_BYTES):
        end = int(np.searchsorted(indices, 1 << 7 * width)) if width < 9 else len(indices)
        if end > start:
            run = indices[start:end]
            digits = np.empty((len(run), width), np.uint8)
            for place in range(width):  # the cast to uint8 cuts off all but the low 8 bits
                digits[:, place] = ((run >> 7 * place).astype(np.uint8) & 0x7F) | 0x80
            digits[:, -1] &= 0x7F
            runs.append(digits.reshape(-1))
        start = end
        if start == len(indices):
            break
    return np.concatenate(runs) if runs else np.empty(0, np.uint8)


def is_nonzero(block: Array) -> NDArray[np.bool_]:
    """Where a 1-D block is not zero; -0.0 counts as zero, NaN does not."""
    if block.dtype.itemsize == 2 and block.dtype.kind not in "iu":
        # fp16 and bfloat16 compare slowly in numpy; zero is "no bit but the sign".
        return np.asarray((block.view(np.uint16) & 0x7FFF) != 0)
    return np.asarray(block != 0)


def nonzero_indices(weight: StoredWeight) -> Iterator[NDArray[np.int64]]:
    """Linear row-major indices of the nonzeros, ascending, a block at a time."""
    offset = 0
    for block in weight.blocks():
        yield np.flatnonzero(is_nonzero(block)).astype(np.int64, copy=False) + offset
        offset += len(block)


def dense_payload(weight: StoredWeight) -> Payload:
    """All elements, row-major, little-endian."""
    return Payload(weight.nbytes, weight.blocks)


def values_payload(weight: StoredWeight, nonzeros: int) -> Payload:
    """The nonzeros in row-major order, little-endian."""
    return Payload(
        nonzeros * weight.dtype.itemsize,
        lambda: (block[is_nonzero(block)] for block in weight.blocks()),
    )


def raw_index_payload(weight: StoredWeight, nonzeros: int) -> Payload:
    """The indices as little-endian int64."""
    return Payload(
        nonzeros * 8, lambda: (part.astype("<i8", copy=False) for part in nonzero_indices(weight))
    )


def varint_index_payload(weight: StoredWeight, length: int) -> Payload:
    """The indices as varints; length: what `varint_lengths` counted."""
    return Payload(length, lambda: (pack_varints(part) for part in nonzero_indices(weight)))


def dense_field(name: str, weight: StoredWeight, data: Payload | External) -> list[Part]:
    """The `initializer` field of GraphProto."""
    header = tensor_header(name, weight.shape, weight.dtype)
    return message(GRAPH_INITIALIZER, _tensor(header, data, _TENSOR_RAW_DATA))


def sparse_field(
    name: str,
    weight: StoredWeight,
    nonzeros: int,
    values: Payload | External,
    indices: Payload | External,
    packed_indices: bool,
) -> list[Part]:
    """The `sparse_initializer` field of GraphProto.

    packed_indices: indices are varints in `int64_data`, else int64 in `raw_data` or external.
    """
    values_header = tensor_header(name, (nonzeros,), weight.dtype)
    index_header = TensorProto(dims=[nonzeros], data_type=TensorProto.INT64)
    index_number = _TENSOR_INT64_DATA if packed_indices else _TENSOR_RAW_DATA
    # Empty packed fields are not written at all: a header alone is the canonical form.
    empty = packed_indices and nonzeros == 0
    body = [
        *message(_SPARSE_VALUES, _tensor(values_header, values, _TENSOR_RAW_DATA)),
        *message(
            _SPARSE_INDICES,
            [index_header.SerializeToString()]
            if empty
            else _tensor(index_header, indices, index_number),
        ),
        SparseTensorProto(dims=weight.shape).SerializeToString(),
    ]
    return message(GRAPH_SPARSE_INITIALIZER, body)


def _tensor(header: TensorProto, data: Payload | External, number: int) -> list[Part]:
    if isinstance(data, Payload):
        return [header.SerializeToString(), *message(number, [data])]
    header.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", data.location),
        ("offset", str(data.offset)),
        ("length", str(data.length)),
    ):
        header.external_data.add(key=key, value=value)
    return [header.SerializeToString()]
