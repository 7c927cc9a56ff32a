"""Python face of the native library: whether it is there, its version, what it can do.

Built by `pip install` into this folder. Without it everything still runs, by numpy; `available()`
says no and why, and nothing here falls back silently.
"""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.errors import UserInputError

ABI_VERSION = 7
ENVIRONMENT = "ELSA_NATIVE_LIBRARY"  # a library to load instead of the installed one
_NAMES = {"win32": "elsa_native.dll", "darwin": "libelsa_native.dylib"}
ISA_ENVIRONMENT = "ELSA_ISA"  # portable, avx2, avx512 or avx512vnni instead of the best
_FEATURES = {
    0: "avx2",
    1: "fma",
    2: "avx512f",
    3: "avx512bw",
    4: "avx512vnni",
    5: "avx512vbmi2",
    8: "neon",
}


def library_path() -> Path:
    """Where the library is looked for first."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    name = _NAMES.get(sys.platform, "libelsa_native.so")
    beside = Path(__file__).resolve().parent / name
    if beside.exists():
        return beside
    # An editable install leaves the sources where they are and puts what it built into
    # site-packages, in the folder of this package.
    for folder in sys.path:
        installed = Path(folder) / "elsa_compile" / "runtime" / name
        if installed.exists():
            return installed
    return beside


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str]:
    """The library, or None and why not."""
    path = library_path()
    if not path.exists():
        return None, f"{path.name} was not built; reinstall elsa-compile where there is a compiler"
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.elsa_abi_version.restype = ctypes.c_int32
        found = int(loaded.elsa_abi_version())
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if found != ABI_VERSION:
        return None, f"{path.name} has interface version {found}, wanted {ABI_VERSION}; reinstall"
    _declare(loaded)
    return loaded, ""


def _declare(library: Any) -> None:
    """Types of the functions in elsa_native.h."""
    pointer, i32, i64, u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    text = ctypes.c_char_p
    functions: dict[str, tuple[Any, list[Any]]] = {
        "elsa_cpu_features": (u64, []),
        "elsa_isa": (text, []),
        "elsa_check_coo_indices": (i64, [pointer, i64, i64]),
        "elsa_pack": (pointer, [pointer, i64, i64, i64, i64, i32, i32, pointer, text, u64]),
        "elsa_open": (pointer, [pointer, u64, text, u64]),
        "elsa_close": (None, [pointer]),
        "elsa_bytes": (pointer, [pointer, pointer]),
        "elsa_describe": (i64, [pointer, i32]),
        "elsa_unpack": (None, [pointer, pointer]),
        "elsa_multiply": (i32, [pointer, pointer, i64, pointer, pointer, i32, text, u64]),
        "elsa_claims": (u64, [text, u64]),
        "elsa_shared_caches": (u64, [text, u64]),
        "elsa_choose": (i32, [i64, i64, i64, i32, i32, pointer]),
        "elsa_adam_step": (i32, [*[pointer] * 7, i64, pointer]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def library() -> Any:
    """The loaded library, its functions declared.

    Raises:
        UserInputError: it is not there.
    """
    loaded, reason = _load()
    if loaded is None:
        raise UserInputError(f"native kernels: {reason}")
    return loaded


def isa() -> str:
    """The instruction set that weights packed now will use: by ELSA_ISA, or the best here.

    Raises:
        UserInputError: ELSA_ISA names none, or one this processor does not have.
    """
    found = library().elsa_isa()
    if found is None:
        raise UserInputError(
            f"{ISA_ENVIRONMENT} is {os.environ.get(ISA_ENVIRONMENT)!r}, wanted portable, avx2, "
            "avx512 or avx512vnni, and one that this processor has"
        )
    name: bytes = found
    return name.decode()


def available() -> tuple[bool, str]:
    """Whether the native library is there; if not, why."""
    loaded, reason = _load()
    return loaded is not None, reason


def cpu_features() -> tuple[str, ...]:
    """Instruction sets this processor executes, of those the kernels know.

    Raises:
        UserInputError: the library is not there.
    """
    bits = int(library().elsa_cpu_features())
    return tuple(name for bit, name in _FEATURES.items() if bits >> bit & 1)


def first_bad_index(indices: NDArray[np.int64], size: int) -> int:
    """Position of the first COO index that is out of [0, size) or not above the one before; or -1.

    By the native library where it is there (one pass, no copies), else by numpy.

    Args:
        indices: (nnz,) int64.
        size: number of elements of the dense tensor.

    >>> first_bad_index(np.array([0, 5, 5, 7]), 8)
    2
    """
    values = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
    loaded, _ = _load()
    if loaded is not None:
        return int(loaded.elsa_check_coo_indices(values.ctypes.data, values.size, size))
    return first_bad_index_numpy(values, size)


def first_bad_index_numpy(indices: NDArray[np.int64], size: int) -> int:
    """The reference of `first_bad_index`."""
    bad = (indices < 0) | (indices >= size)
    bad[1:] |= indices[1:] <= indices[:-1]
    return int(bad.argmax()) if bad.any() else -1
