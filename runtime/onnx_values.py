"""Values of ONNX tensors as numpy arrays; only of files that `onnx_file.inspect` has passed.

Types numpy does not have are widened: bfloat16 to float32, int4 and uint4 to one byte an element.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.onnx_tensors import Malformed, Stored, check_sparse, check_tensor

Array = NDArray[Any]
_NIBBLES = ("int4", "uint4")


def dense_values(tensor: Any, what: str, folder: Path) -> Array:
    """Values of a TensorProto in its shape.

    Args:
        tensor: TensorProto.
        what: how to call it in an error.
        folder: the model's folder.

    Raises:
        Malformed: its claims do not hold, or a type whose values this release cannot read.
    """
    return _values(tensor, check_tensor(tensor, what, folder), what)


def raw_values(tensor: Any, what: str, folder: Path) -> Array:
    """As `dense_values`, but bfloat16 stays uint16 and int4 lies two to a byte (bytes,) uint8.

    Raises:
        Malformed: as `dense_values`.
    """
    stored = check_tensor(tensor, what, folder)
    return _values(tensor, stored, what, widen=False)


def sparse_parts(
    sparse: Any, what: str, folder: Path, widen: bool = True
) -> tuple[Array, NDArray[np.int64]]:
    """Values (nnz,) of a SparseTensorProto and their linear indices (nnz,), increasing.

    widen: False leaves bfloat16 as uint16.

    Raises:
        Malformed: as `dense_values`, or indices out of range, unsorted or twice.
    """
    stored, where = check_sparse(sparse, what, folder)
    indices = _values(sparse.indices, where, what)
    if indices.ndim == 2:
        # Checked above: every coordinate lies inside its dimension.
        indices = np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))
    return _values(sparse.values, stored, what, widen), np.asarray(indices, dtype=np.int64)


def sparse_values(sparse: Any, what: str, folder: Path) -> Array:
    """A SparseTensorProto made dense; the caller has checked that there is memory for it."""
    values, indices = sparse_parts(sparse, what, folder)
    dense = np.zeros(int(np.prod(sparse.dims, dtype=np.int64)), dtype=values.dtype)
    dense[indices] = values
    return dense.reshape(tuple(sparse.dims))


def _values(tensor: Any, stored: Stored, what: str, widen: bool = True) -> Array:
    dtype = stored.dtype
    halves = dtype.name in _NIBBLES
    kind = {"bfloat16": "<u2", **dict.fromkeys(_NIBBLES, "|u1")}.get(dtype.name, dtype.numpy)
    if kind is None:
        raise Malformed(f"{what} is of type {dtype.name}, whose values this release cannot read")
    size = stored.nbytes // np.dtype(kind).itemsize
    flat: Any
    if stored.external is not None and size:
        flat = np.memmap(stored.external.path, kind, "r", stored.external.offset, (size,))
    elif tensor.raw_data or not size:
        flat = np.frombuffer(tensor.raw_data, dtype=kind)
    else:
        flat = _typed(tensor, dtype.name, dtype.field, kind)
    if not widen:
        return np.asarray(flat) if halves else np.asarray(flat).reshape(stored.shape)
    if dtype.name == "bfloat16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    elif halves:
        flat = _unfolded(flat, int(np.prod(stored.shape, dtype=np.int64)), dtype.name == "int4")
    elif dtype.name == "bool":
        flat = flat != 0
    return np.asarray(flat).reshape(stored.shape)


def _typed(tensor: Any, name: str, field: str, kind: str) -> Array:
    """Values from a typed field. float16 and bfloat16 lie there as bit patterns."""
    found = np.array(getattr(tensor, field))
    if name == "float16":
        return found.astype(np.uint16).view(np.float16)
    if name.startswith("complex"):
        return found.astype(np.float64).view(np.complex128).astype(kind)
    return found.astype(kind)


def _unfolded(folded: Array, count: int, signed: bool) -> Array:
    """Nibbles, low half first, one a byte: [0x2F] -> [-1, 2] signed, [15, 2] unsigned."""
    both = np.stack([folded & 0xF, folded >> 4], axis=-1).reshape(-1)[:count]
    if not signed:
        return both
    return ((both ^ 8).astype(np.int8) - 8).astype(np.int8)
