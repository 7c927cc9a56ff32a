"""The execution provider of our kernels, as onnxruntime's plugin convention has it.

A session that is opened with it runs the MatMul and Gemm products whose constant weight has enough
zeros on the packed kernels, whoever made the file; everything else stays with onnxruntime. In plain
onnxruntime, from version 1.23:

    onnxruntime.register_execution_provider_library("elsa", provider.get_library_path())
    mine = [d for d in onnxruntime.get_ep_devices() if d.ep_name in provider.get_ep_names()]
    options.add_provider_for_devices(mine[:1], {})
"""

import ctypes
import json
import os
from collections.abc import Mapping
from typing import Any

from elsa_compile.runtime import kernels
from elsa_compile.runtime.errors import UserInputError

NAME = "ElsaSparseExecutionProvider"
ENVIRONMENT = "ELSA_KERNELS"  # 0: never; 1: always, or an error; unset: where it can be
_REGISTERED = "elsa-compile"
_OPTIONS = {
    "values": ("exact", "float32", "bfloat16", "float16", "int8"),
    "activations": ("float32", "int16"),
    "format": ("bitmap", "sliced", "rows"),
    "lanes": ("auto", "none"),
    "fuse": ("all", "products"),
    "cache": ("copied", "shared"),
    "least_gain": (),
}


def get_library_path() -> str:
    """The library to register, from the root: onnxruntime looks for others in its own folder.

    Raises:
        UserInputError: it was not built.
    """
    kernels.library()
    return str(kernels.library_path().absolute())


def get_ep_names() -> list[str]:
    """Names of the execution providers in it."""
    return [NAME]


def wanted() -> bool | None:
    """What the environment says: True, False, or None when it says nothing.

    Raises:
        UserInputError: it says something else than 0 or 1.
    """
    said = os.environ.get(ENVIRONMENT, "")
    if said not in ("", "0", "1"):
        raise UserInputError(f"{ENVIRONMENT} is {said!r}, wanted 0 or 1")
    return None if said == "" else said == "1"


def devices(ort: Any) -> list[Any]:
    """The devices to add to session options; registers the library the first time.

    Args:
        ort: the package onnxruntime.

    Raises:
        UserInputError: the library is not there, or this onnxruntime is too old for it.
    """
    path = get_library_path()
    if not hasattr(ort, "register_execution_provider_library"):
        raise UserInputError(
            f"the sparse kernels need onnxruntime 1.23 or newer, found {ort.__version__}"
        )
    kernels.isa()  # a wrong ELSA_ISA is said here, in one sentence
    found = _found(ort)
    if not found:
        try:
            ort.register_execution_provider_library(_REGISTERED, path)
        except Exception as error:
            raise UserInputError(f"onnxruntime refuses the sparse kernels: {error}") from None
        found = _found(ort)
    if not found:
        raise UserInputError("onnxruntime offers no CPU device for the sparse kernels")
    return found[:1]


def _found(ort: Any) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == NAME]


def check_options(options: Mapping[str, str]) -> None:
    """Options of the provider: values, activations, format, fuse, cache, least_gain.

    Raises:
        UserInputError: an unknown one, or a value it does not take.
    """
    for key, value in options.items():
        if key not in _OPTIONS:
            raise UserInputError(
                f"kernels: option {key!r} is unknown, wanted {', '.join(_OPTIONS)}"
            )
        if _OPTIONS[key] and value not in _OPTIONS[key]:
            raise UserInputError(
                f"kernels: {key} is {value!r}, wanted one of {', '.join(_OPTIONS[key])}"
            )
        if key == "least_gain" and not value.replace(".", "", 1).isdigit():
            raise UserInputError(f"kernels: least_gain is {value!r}, wanted a number, 0 or more")


def claims() -> list[dict[str, Any]]:
    """What the session opened last does with each product of an activation and a weight.

    Returns:
        One object each: node, op, rows, columns, nonzeros, bytes (packed), lane_bytes (of the
        second form that few tokens read instead; 0: there is none), format ("bitmap", "sliced",
        "rows" or "dense"), type (of the values kept; "" of "dense"), why (of "dense"),
        gain (expected, for one token).
    """
    found: list[dict[str, Any]] = _said(kernels.library().elsa_claims)
    return found


def shared_caches() -> set[str]:
    """The inputs of the session opened last that are caches with room (option cache: shared)."""
    return set(_said(kernels.library().elsa_shared_caches))


def _said(function: Any) -> Any:
    """What a function of the library writes as JSON."""
    size = int(function(None, 0)) + 1
    text = ctypes.create_string_buffer(size)
    function(text, size)
    return json.loads(text.value.decode("utf-8", "replace"))
