"""Session options and model of a CUDA session whose packed weights are multiplied packed."""

import logging
from collections.abc import Mapping
from typing import Any

from elsa_compile.runtime import cuda_library
from elsa_compile.runtime.cuda_products import OPERATOR, Rewritten, rewrite
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.onnx_file import ModelFile, load_checked
from elsa_compile.runtime.onnx_tensors import Malformed
from elsa_compile.runtime.provider import wanted

log = logging.getLogger(__name__)
_FOLDER = "session.model_external_initializers_file_folder_path"


def prepare(
    file: ModelFile, options: Any, kernels: bool | Mapping[str, str] | None = None
) -> bytes | None:
    """Make a session's options, and the model it opens, run packed products on the GPU.

    Args:
        file: a checked model.
        options: onnxruntime.SessionOptions; gets the operators.
        kernels: as of `session`.

    Returns:
        The rewritten model, to be opened instead of the file; None: nothing in it is packed, or
        the kernels are not wanted, or they cannot be had and need not be: then a warning said so.

    Raises:
        UserInputError: they are wanted and cannot be had; options, which are of the CPU's kernels.
    """
    if isinstance(kernels, Mapping) and kernels:
        raise UserInputError(
            f"kernels: the options {', '.join(kernels)} are of the kernels on the CPU, but the "
            "session runs on CUDA; give True, or --provider cpu"
        )
    choice = wanted() if kernels is None else bool(kernels) or isinstance(kernels, Mapping)
    if choice is False or not any(weight.form == "packed" for weight in file.weights):
        return None
    try:
        model = load_checked(file)
        made = rewrite(model, file.path.parent)
    except Malformed as fault:
        raise UserInputError(f"{file.path}: {fault}; get it again") from None
    _say(made, file)
    if not made.products:
        return None
    try:
        cuda_library.register(options)
    except UserInputError as error:
        if choice is not None:
            raise
        log.warning("packed weights run as dense ones: %s", error)
        return None
    options.add_session_config_entry(_FOLDER, str(file.path.parent.resolve()))
    data: bytes = model.SerializeToString()
    return data


def is_without_cuda(error: Exception) -> bool:
    """Whether onnxruntime's CUDA provider, which alone has the operator, could not be loaded."""
    return f"implementation for {OPERATOR}" in str(error)


def _say(made: Rewritten, file: ModelFile) -> None:
    log.info("%s: %d weights are multiplied packed on CUDA", file.path, len(made.products))
    for name, why in made.left:
        log.info("%s: %s is unpacked: %s", file.path, name, why)
