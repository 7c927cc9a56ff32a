"""Packed weights: the sparse formats of the kernels. Pack, check, unpack, multiply.

Two formats, drawn in docs/kernels.md: "bitmap" (one bit a weight before the values) and
"sliced" (sixteen rows side by side, columns as 8-bit steps). A third, "rows", holds every value
and exists in memory only, for weights with too few zeros. Values are float32, bfloat16, float16, or
int8 with one scale a row. All work is the native library's.
"""

import ctypes
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime import kernels
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.reference import DTYPES, FORMATS

Activations = Literal["float32", "int16"]
ALIGNMENT = 64
KERNEL_FORMATS = (*FORMATS, "rows")
# Of the execution provider (cost.h, provider.cpp): from which expected gain on it takes a weight,
# and how much faster than float32 onnxruntime's own int8 product counts as.
LEAST_GAIN = 1.15
DENSE_INT8_GAIN = 3.0
MAX_ROWS = MAX_COLUMNS = 1 << 24
_MESSAGE_BYTES = 512
_ISA = ("portable", "avx2", "avx512", "avx512vnni")


class PackedWeight:
    """A packed weight (N, K), ready to be multiplied with.

    Attributes:
        shape: (N, K).
        format: "bitmap", "sliced" or "rows".
        dtype: "float32", "bfloat16", "float16" or "int8".
        nonzeros: stored values.
        lane_bytes: of the second form that few tokens read (docs/kernels.md); 0: there is none.
        isa: the instruction set its products use; that of ELSA_ISA when it was made, or the best.
    """

    def __init__(self, handle: int, keep: Any = None) -> None:
        """Of a handle of the native library; `keep` is what must live as long as this."""
        self._library = kernels.library()
        self._handle = handle
        self._keep = keep
        about = [int(self._library.elsa_describe(handle, what)) for what in range(7)]
        self.shape = (about[0], about[1])
        self.format = KERNEL_FORMATS[about[2] - 1]
        self.dtype = DTYPES[about[3]]
        self.nonzeros = about[4]
        self.isa = _ISA[about[5]]
        self.lane_bytes = about[6]

    def __del__(self) -> None:
        """Give the memory back."""
        if getattr(self, "_handle", None):
            self._library.elsa_close(self._handle)

    @property
    def data(self) -> NDArray[np.uint8]:
        """A copy of the packed bytes, at a multiple of 64."""
        size = ctypes.c_uint64(0)
        start = self._library.elsa_bytes(self._handle, ctypes.byref(size))
        made = aligned(size.value)
        ctypes.memmove(made.ctypes.data, start, size.value)
        return made

    @property
    def nbytes(self) -> int:
        """Packed bytes, everything included."""
        size = ctypes.c_uint64(0)
        self._library.elsa_bytes(self._handle, ctypes.byref(size))
        return int(size.value)

    def unpack(self) -> NDArray[np.float32]:
        """The dense weight (N, K), with the values as they are stored."""
        dense = np.empty(self.shape, dtype=np.float32)
        self._library.elsa_unpack(self._handle, dense.ctypes.data)
        return dense

    def multiply(
        self,
        x: NDArray[np.float32],
        bias: NDArray[np.float32] | None = None,
        activations: Activations = "float32",
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Activations x (M, K) times this weight, transposed, plus bias (N,): (M, N); one thread.

        Args:
            x: activations, any floating type.
            bias: or None.
            activations: "int16" rounds each token to integers of up to 16 bits first, if the
                weight is int8 and the tokens are few (docs/kernels.md); sums are exact then.
            out: (M, N) float32, contiguous, for the result; else a new array.

        Raises:
            UserInputError: shapes that do not fit.
        """
        rows, columns = self.shape
        if x.ndim != 2 or x.shape[1] != columns:
            raise UserInputError(f"multiply: x has shape {x.shape}, wanted (M, {columns})")
        if bias is not None and bias.shape != (rows,):
            raise UserInputError(f"multiply: bias has shape {bias.shape}, wanted ({rows},)")
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.empty((len(x), rows), dtype=np.float32) if out is None else out
        if y.shape != (len(x), rows) or y.dtype != np.float32 or not y.flags.c_contiguous:
            raise UserInputError(f"multiply: out must be contiguous float32 ({len(x)}, {rows})")
        added = None if bias is None else np.ascontiguousarray(bias, dtype=np.float32)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        failed = self._library.elsa_multiply(
            self._handle,
            x.ctypes.data,
            len(x),
            y.ctypes.data,
            None if added is None else added.ctypes.data,
            int(activations == "int16"),
            message,
            _MESSAGE_BYTES,
        )
        if failed:
            raise UserInputError(f"multiply: {message.value.decode()}")
        return y


def aligned(size: int) -> NDArray[np.uint8]:
    """Uninitialised bytes at a multiple of 64."""
    memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def pack(
    weight: NDArray[np.float32],
    format: str = "bitmap",
    dtype: str = "float32",
    scales: NDArray[np.float32] | None = None,
) -> PackedWeight:
    """Pack the non-zeros of a dense weight.

    Args:
        weight: (N, K) float32, any strides.
        format: "bitmap", "sliced", or "rows", whose bytes `load` does not take.
        dtype: what the values are stored as.
        scales: (N,) for int8; None takes a row's largest magnitude / 127.

    Raises:
        UserInputError: an unknown format or type, an empty or too large weight, int8 of values that
            are not finite.
    """
    if format not in KERNEL_FORMATS or dtype not in DTYPES:
        raise UserInputError(
            f"pack: format {format!r} and type {dtype!r}, wanted one of "
            f"{', '.join(KERNEL_FORMATS)} and one of {', '.join(DTYPES)}"
        )
    weight = np.asarray(weight, dtype=np.float32)
    if weight.ndim != 2:
        raise UserInputError(f"pack: the weight has shape {weight.shape}, wanted (N, K)")
    if scales is not None and (dtype != "int8" or scales.shape != (len(weight),)):
        raise UserInputError(
            f"pack: scales of shape {scales.shape} for {dtype}, wanted ({len(weight)},) for int8"
        )
    # The library takes strides, but forward ones of whole floats only.
    if any(stride < 0 or stride % 4 for stride in weight.strides):
        weight = np.ascontiguousarray(weight)
    rows, columns = weight.shape
    given = None if scales is None else np.ascontiguousarray(scales, dtype=np.float32)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    handle = kernels.library().elsa_pack(
        weight.ctypes.data,
        rows,
        columns,
        weight.strides[0] // 4,
        weight.strides[1] // 4,
        KERNEL_FORMATS.index(format) + 1,
        DTYPES.index(dtype),
        None if given is None else given.ctypes.data,
        message,
        _MESSAGE_BYTES,
    )
    if not handle:
        raise UserInputError(f"pack: {message.value.decode()}")
    return PackedWeight(handle)


def load(data: NDArray[np.uint8]) -> PackedWeight:
    """Packed bytes, from anywhere, as a weight. They are checked in full and not copied.

    Bytes that do not lie at a multiple of 64 are moved there first.

    Raises:
        UserInputError: they are damaged; says what is wrong.
    """
    flat = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if flat.ctypes.data % ALIGNMENT:
        moved = aligned(flat.size)
        moved[:] = flat
        flat = moved
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    handle = kernels.library().elsa_open(flat.ctypes.data, flat.size, message, _MESSAGE_BYTES)
    if not handle:
        raise UserInputError(f"load: {message.value.decode()}; pack the weight again")
    return PackedWeight(handle, flat)


def bitmap_nbytes(rows: int, columns: int, group_nonzeros: list[int], dtype: str) -> int:
    """Bytes of a bitmap weight: by the formula, without packing.

    Args:
        rows: N.
        columns: K.
        group_nonzeros: non-zeros of each group of four rows.
        dtype: of the values.
    """
    value = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[dtype]
    masks = -(-columns // 64) * 4 * 8

    def whole(size: int) -> int:
        return -(-size // ALIGNMENT) * ALIGNMENT

    fixed = ALIGNMENT + whole((len(group_nonzeros) + 1) * 8)
    if dtype == "int8":
        fixed += 2 * whole(rows * 4)
    return fixed + sum(whole(masks + count * value) for count in group_nonzeros) + ALIGNMENT


def choose(
    rows: int, columns: int, nonzeros: int, dtype: str = "float32", whole: bool = True
) -> tuple[str, float]:
    """What the cost model says of a weight, and the expected gain.

    "bitmap", "sliced" or "rows"; "dense" where it stays with onnxruntime. The gain is onnxruntime's
    dense float32 time over the packed one, for one token.

    Args:
        rows: N.
        columns: K.
        nonzeros: of its entries.
        dtype: of the values.
        whole: it can be kept with all its values; what a file holds packed cannot.
    """
    gain = ctypes.c_double(1.0)
    found = kernels.library().elsa_choose(
        rows, columns, nonzeros, DTYPES.index(dtype), whole, ctypes.byref(gain)
    )
    return ("dense", *KERNEL_FORMATS)[found], gain.value


def kept_type(rows: int, columns: int, nonzeros: int, narrow: str, whole: bool = True) -> str:
    """How the provider keeps float32 values that are all numbers of a smaller type.

    Args:
        rows: N.
        columns: K.
        nonzeros: of its entries.
        narrow: bfloat16 or float16, or float32 when there is no such type.
        whole: as in `choose`.

    Returns:
        narrow where that is expected to be faster, else float32.
    """
    gains = {t: choose(rows, columns, nonzeros, t, whole)[1] for t in ("float32", narrow)}
    return narrow if gains[narrow] > gains["float32"] else "float32"


def taken(rows: int, columns: int, nonzeros: int, dtype: str = "float32") -> bool:
    """Whether the execution provider, with its usual options, runs such a weight on our kernels.

    Args:
        rows: N.
        columns: K.
        nonzeros: of its entries.
        dtype: as it is kept: float32, bfloat16, float16 or int8.
    """
    form, gain = choose(rows, columns, nonzeros, dtype)
    least = LEAST_GAIN * (DENSE_INT8_GAIN if dtype == "int8" else 1.0)
    return form != "dense" and gain >= least
