"""Checks of single ONNX tensors: every size is compared with the bytes behind it before use.

A file from outside can claim anything: dimensions whose product overflows, more values than bytes,
indices past the end, data in a file of somebody else. onnxruntime catches a part of it; duplicate
sparse indices, for one, silently lose a value there. Each finding is a `Malformed`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# 2^42 elements are 4 TiB of int8: larger than any weight, small enough that no product overflows.
MAX_ELEMENTS = 1 << 42
MAX_RANK = 32
_SLICE = 1 << 20  # indices looked at together: 8 MiB


class Malformed(Exception):
    """What is wrong with a tensor, without the name of the file: the caller knows it."""


class DType(NamedTuple):
    """How an ONNX element type is stored."""

    name: str
    bits: int  # 0: no fixed size (strings)
    field: str  # the typed field of TensorProto
    # Elements a value of the typed field holds: 2 for int4; 0.5 for complex, which takes two.
    per_value: float = 1
    numpy: str | None = None  # dtype of the raw bytes where numpy has it


# By TensorProto.DataType, a part of the file format; numbers so that old onnx packages do too.
DTYPES: dict[int, DType] = {
    1: DType("float32", 32, "float_data", numpy="<f4"),
    2: DType("uint8", 8, "int32_data", numpy="<u1"),
    3: DType("int8", 8, "int32_data", numpy="<i1"),
    4: DType("uint16", 16, "int32_data", numpy="<u2"),
    5: DType("int16", 16, "int32_data", numpy="<i2"),
    6: DType("int32", 32, "int32_data", numpy="<i4"),
    7: DType("int64", 64, "int64_data", numpy="<i8"),
    8: DType("string", 0, "string_data"),
    9: DType("bool", 8, "int32_data", numpy="<u1"),
    10: DType("float16", 16, "int32_data", numpy="<f2"),
    11: DType("float64", 64, "double_data", numpy="<f8"),
    12: DType("uint32", 32, "uint64_data", numpy="<u4"),
    13: DType("uint64", 64, "uint64_data", numpy="<u8"),
    14: DType("complex64", 64, "float_data", 0.5, "<c8"),
    15: DType("complex128", 128, "double_data", 0.5, "<c16"),
    16: DType("bfloat16", 16, "int32_data"),
    17: DType("float8e4m3fn", 8, "int32_data"),
    18: DType("float8e4m3fnuz", 8, "int32_data"),
    19: DType("float8e5m2", 8, "int32_data"),
    20: DType("float8e5m2fnuz", 8, "int32_data"),
    21: DType("uint4", 4, "int32_data", 2),
    22: DType("int4", 4, "int32_data", 2),
    23: DType("float4e2m1", 4, "int32_data", 2),
    24: DType("float8e8m0", 8, "int32_data"),
    25: DType("uint2", 2, "int32_data", 4),
    26: DType("int2", 2, "int32_data", 4),
}
_TYPED_FIELDS = sorted({dtype.field for dtype in DTYPES.values()})


@dataclass(frozen=True)
class External:
    """A checked range of bytes in a file beside the model."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor whose claims hold.

    Attributes:
        shape: its dimensions.
        dtype: its element type.
        nbytes: bytes of all its elements, dense.
        external: where they lie when not in the model file.
    """

    shape: tuple[int, ...]
    dtype: DType
    nbytes: int
    external: External | None


def shown(name: str) -> str:
    """A name from the file, safe to print: control characters escaped, cut at 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def element_count(dims: Any, what: str) -> int:
    """Product of dimensions, each and all within bounds."""
    if len(dims) > MAX_RANK:
        raise Malformed(f"{what} has {len(dims)} dimensions, wanted at most {MAX_RANK}")
    count = 1
    span = 1  # the product without zeros: [0, 2^62, 2^62] is absurd too
    for dim in dims:
        if dim < 0:
            raise Malformed(f"{what} has a negative size: shape {list(dims)}")
        count *= dim
        span *= max(dim, 1)
    if span > MAX_ELEMENTS:
        raise Malformed(f"{what} has an absurd size: shape {list(dims)}")
    return count


def check_tensor(tensor: Any, what: str, folder: Path) -> Stored:
    """Check a TensorProto: type, shape, and that its bytes are exactly there.

    Args:
        tensor: TensorProto.
        what: how to call it in an error.
        folder: the model's folder, in which external data must lie.

    Raises:
        Malformed: with the first thing that is wrong.
    """
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        raise Malformed(f"{what} has the unknown element type {tensor.data_type}")
    count = element_count(tensor.dims, what)
    if tensor.HasField("segment"):
        raise Malformed(f"{what} is stored in segments, which nothing reads")
    filled = {field: len(getattr(tensor, field)) for field in _TYPED_FIELDS}
    filled = {field: length for field, length in filled.items() if length}
    nbytes = (count * dtype.bits + 7) // 8
    if tensor.data_location == 1:
        if filled or tensor.raw_data:
            raise Malformed(f"{what} has data both in the file and outside")
        if not dtype.bits:
            raise Malformed(f"{what} keeps strings outside the file")
        external = find_external(tensor, nbytes, what, folder)
        return Stored(tuple(tensor.dims), dtype, nbytes, external)
    if tensor.external_data or tensor.data_location != 0:
        raise Malformed(f"{what} does not say clearly where its data is")
    if tensor.raw_data:
        if filled or not dtype.bits:
            raise Malformed(f"{what} has data in raw_data that does not belong there")
        _same(len(tensor.raw_data), nbytes, "bytes", what, tensor.dims)
    else:
        wanted = -(-count // int(dtype.per_value)) if dtype.per_value >= 1 else 2 * count
        if set(filled) - {dtype.field}:
            raise Malformed(f"{what} is {dtype.name} but has data in {sorted(filled)}")
        _same(filled.get(dtype.field, 0), wanted, "values", what, tensor.dims)
    return Stored(tuple(tensor.dims), dtype, nbytes, None)


def _same(found: int, wanted: int, unit: str, what: str, dims: Any) -> None:
    if found != wanted:
        raise Malformed(
            f"{what} of shape {list(dims)} has {found} {unit} of data, wanted exactly {wanted}"
        )


def find_external(tensor: Any, nbytes: int, what: str, folder: Path) -> External:
    """The byte range of external data, inside the model's folder and inside its file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        raise Malformed(f"{what} names a key of its external data twice")
    unknown = set(entries) - {"location", "offset", "length", "checksum"}
    if unknown:
        raise Malformed(f"{what} has external data with the unknown key {shown(min(unknown))}")
    path = external_path(entries.get("location", ""), what, folder)
    offset = _number(entries.get("offset", "0"), "offset", what)
    available = path.stat().st_size - offset
    length = _number(entries["length"], "length", what) if "length" in entries else nbytes
    if length != nbytes:
        raise Malformed(f"{what} has {length} bytes of external data, wanted exactly {nbytes}")
    if available < length:
        raise Malformed(
            f"{what} wants {length} bytes at offset {offset} of {shown(path.name)}, which has only "
            f"{path.stat().st_size} bytes"
        )
    return External(path, offset, length)


def external_path(location: str, what: str, folder: Path) -> Path:
    """The file of an external location; refused when it is not below the model's folder."""
    # onnxruntime reads this marker as "offset is an address in my memory".
    if "_ORT_MEM_ADDR_" in location:
        raise Malformed(f"{what} has external data at an address in memory")
    pure = PurePosixPath(location)
    windows = PureWindowsPath(location)
    escapes = pure.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    if not location or "\0" in location or escapes or ".." in windows.parts:
        raise Malformed(
            f"{what} has external data at {shown(location)}, which is not inside the model's folder"
        )
    root = folder.resolve()
    try:
        path = (root / pure).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise Malformed(
            f"{what} has external data in {shown(location)}, which is not beside the model"
        ) from None
    if not path.is_relative_to(root):
        raise Malformed(
            f"{what} has external data in {shown(location)}, a link that leaves the model's folder"
        )
    if not path.is_file():
        raise Malformed(f"{what} has external data in {shown(location)}, not a regular file")
    return path


def _number(text: str, key: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise Malformed(f"{what} has external data with {key} {shown(text)}, wanted a byte count")
    return int(text)


def check_sparse(sparse: Any, what: str, folder: Path) -> tuple[Stored, Stored]:
    """Check a SparseTensorProto; its values and indices.

    Indices are (nnz,) linear or (nnz, rank) int64, in range, sorted and unique.

    Raises:
        Malformed: with the first thing that is wrong.
    """
    count = element_count(sparse.dims, what)
    if not sparse.dims:
        raise Malformed(f"{what} is sparse and has no dimensions")
    values = check_tensor(sparse.values, f"{what} (values)", folder)
    if len(values.shape) != 1:
        raise Malformed(f"{what} has values of shape {list(values.shape)}, wanted one dimension")
    indices = check_tensor(sparse.indices, f"{what} (indices)", folder)
    if indices.dtype.name != "int64":
        raise Malformed(f"{what} has {indices.dtype.name} indices, wanted int64")
    nnz, rank = values.shape[0], len(sparse.dims)
    if indices.shape not in ((nnz,), (nnz, rank)):
        raise Malformed(
            f"{what} has {nnz} values but indices of shape {list(indices.shape)}, wanted "
            f"[{nnz}] or [{nnz}, {rank}]"
        )
    last = -1
    for start, block in _index_blocks(sparse.indices, indices):
        linear = _linear(block, tuple(sparse.dims), count, what)
        last = _check_order(linear, last, start, what)
    return values, indices


def _index_blocks(tensor: Any, stored: Stored) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Indices in slices (rows, ...) int64, with the number of the first row."""
    flat: Any
    if stored.external is not None and stored.external.length:
        where = stored.external
        flat = np.memmap(where.path, "<i8", "r", where.offset, (where.length // 8,))
    elif tensor.raw_data:
        flat = np.frombuffer(tensor.raw_data, dtype="<i8")
    else:
        flat = np.array(tensor.int64_data, dtype=np.int64)
    rows = flat.reshape(stored.shape)
    for start in range(0, len(rows), _SLICE):
        yield start, np.asarray(rows[start : start + _SLICE])


def _linear(
    block: NDArray[np.int64], dims: tuple[int, ...], count: int, what: str
) -> NDArray[np.int64]:
    """Linear indices of a block, each coordinate checked against its dimension."""
    limits = np.array(dims if block.ndim == 2 else (count,), dtype=np.int64)
    columns = block if block.ndim == 2 else block[:, None]
    outside = (columns < 0) | (columns >= limits)
    if outside.any():
        found = int(columns[outside][0])
        raise Malformed(f"{what} has the index {found}, outside of its shape {list(dims)}")
    if block.ndim == 1:
        return block
    linear = np.zeros(len(block), dtype=np.int64)
    for axis, dim in enumerate(dims):
        linear = linear * dim + block[:, axis]
    return linear


def _check_order(linear: NDArray[np.int64], last: int, start: int, what: str) -> int:
    """Last index of a block that goes on from `last`, strictly increasing."""
    steps = np.diff(linear, prepend=last)
    bad = np.flatnonzero(steps <= 0)
    if bad.size:
        place, step = start + int(bad[0]), int(steps[bad[0]])
        fault = "a duplicate index" if step == 0 else "unsorted indices"
        raise Malformed(
            f"{what} has {fault} (at position {place}), wanted strictly increasing ones"
        )
    return int(linear[-1])


def count_zeros(tensor: Any, stored: Stored) -> int | None:
    """Zeros among the stored elements; None for a type whose zeros this release cannot count."""
    if stored.dtype.name == "bfloat16":
        return _zeros_of(tensor, stored, "<u2", 0x7FFF)
    if stored.dtype.numpy is None:
        return None
    return _zeros_of(tensor, stored, stored.dtype.numpy, None)


def _zeros_of(tensor: Any, stored: Stored, numpy_dtype: str, significant: int | None) -> int:
    """Zeros of a tensor read as a numpy dtype; `significant`: the bits that are not the sign."""
    flat: Any
    size = stored.nbytes // np.dtype(numpy_dtype).itemsize
    if size == 0:
        return 0
    if stored.external is not None:
        flat = np.memmap(stored.external.path, numpy_dtype, "r", stored.external.offset, (size,))
    elif tensor.raw_data:
        flat = np.frombuffer(tensor.raw_data, dtype=numpy_dtype)
    else:
        # float16 and bfloat16 lie in int32_data as bit patterns, where -0.0 is 0x8000.
        flat = np.array(getattr(tensor, stored.dtype.field))
        if stored.dtype.name == "float16":
            significant = 0x7FFF
        if stored.dtype.per_value < 1:
            flat = flat.reshape(-1, 2).any(axis=1)
    zeros = 0
    for start in range(0, len(flat), 8 * _SLICE):
        part = flat[start : start + 8 * _SLICE]
        part = part & significant if significant is not None else part
        zeros += len(part) - int(np.count_nonzero(part))
    return zeros
