"""The library of the operators for NVIDIA GPUs: whether it is there, and its registration.

Built beside the other one where `pip install` finds nvcc (docs/cuda.md). It loads without a GPU.
"""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from elsa_compile.runtime.errors import UserInputError

ENVIRONMENT = "ELSA_CUDA_LIBRARY"  # a library to load instead of the installed one
VERSION = 1  # of the operator's inputs and attributes
_NAME = "libelsa_cuda.so"


def library_path() -> Path:
    """Where the library is looked for first."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    beside = Path(__file__).resolve().parent / _NAME
    if beside.exists():
        return beside
    for folder in sys.path:  # of an editable install
        installed = Path(folder) / "elsa_compile" / "runtime" / _NAME
        if installed.exists():
            return installed
    return beside


def available() -> tuple[bool, str]:
    """Whether the library is there; if not, why. Says nothing about a GPU."""
    return _checked(str(library_path()))


@lru_cache(maxsize=4)
def _checked(path: str) -> tuple[bool, str]:
    name = Path(path).name
    if not Path(path).exists():
        return False, f"{name} was not built; reinstall elsa-compile where there is nvcc"
    try:
        found = int(ctypes.CDLL(path).elsa_cuda_version())
    except (OSError, AttributeError) as error:
        return False, f"{name} cannot be loaded: {error}"
    if found != VERSION:
        return False, f"{name} has interface version {found}, wanted {VERSION}; reinstall"
    return True, ""


def register(options: Any) -> None:
    """Add the operators to an onnxruntime.SessionOptions.

    Raises:
        UserInputError: the library is not there, or this onnxruntime refuses it.
    """
    ok, why = available()
    if not ok:
        raise UserInputError(f"packed products on CUDA: {why}")
    try:
        options.register_custom_ops_library(str(library_path()))
    except Exception as error:
        raise UserInputError(f"onnxruntime refuses {library_path().name}: {error}") from None
