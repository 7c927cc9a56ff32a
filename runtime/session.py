"""model.onnx -> onnxruntime session: checked first, quiet, on the provider that was asked for."""

import contextlib
import ctypes
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from elsa_compile.runtime import cuda_session
from elsa_compile.runtime import provider as sparse
from elsa_compile.runtime.errors import ElsaError, UnsupportedModelError, UserInputError
from elsa_compile.runtime.forms import decode_bytes, dtype_bits
from elsa_compile.runtime.onnx_file import ModelFile, inspect, locate

log = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "cuda"]
# Of quantised models: onnxruntime's fused products round the activations to int8 too, unless told
# not to. With this, results are those of the weights' exact values, and checks can be strict.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}
ACTIVATIONS = "elsa_compile.activations"  # of the file's metadata: "integer" or "float32"
_NO_LIBRARIES = (
    "--provider cuda: onnxruntime cannot load its CUDA libraries (CUDA or cuDNN of the version it "
    "was built for are missing); available here: cpu"
)
# What the library says of a session is of the one opened last.
_opening = threading.RLock()
_sharing: "weakref.WeakSet[Any]" = weakref.WeakSet()
_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def session(
    path: str | Path,
    threads: int | None = None,
    provider: str = "auto",
    checked: ModelFile | None = None,
    config: Mapping[str, str] | None = None,
    kernels: bool | Mapping[str, str] | None = None,
) -> Any:
    """Open a model in onnxruntime.

    Args:
        path: the .onnx file, or the folder that holds model.onnx.
        threads: threads of one operator; None lets onnxruntime take all cores.
        provider: "cpu", "cuda", or "auto": CUDA where it really works, else the CPU.
        checked: what `inspect` said about this file; None checks it here.
        config: further session options of onnxruntime, by their full name. Products of a file
            whose metadata want float32 activations are exact unless this says otherwise.
        kernels: our sparse kernels; on CUDA for packed weights (docs/cuda.md). True: or an error;
            False: never; None: as ELSA_KERNELS says, else where they can be had, with a warning
            where not. Options of the provider (docs/kernels.md), on the CPU, stand for True.

    Returns:
        onnxruntime.InferenceSession.

    Raises:
        UserInputError: malformed file, too large for this machine, provider or kernels not
            available.
        UnsupportedModelError: an operator or version that this onnxruntime does not know.
    """
    with _opening:
        return _session(path, threads, provider, checked, config, kernels)


def _session(
    path: str | Path,
    threads: int | None,
    provider: str,
    checked: ModelFile | None,
    config: Mapping[str, str] | None,
    kernels: bool | Mapping[str, str] | None,
    shared: bool = False,
) -> Any:
    """`session`, perhaps with the provider's option cache: shared."""
    if threads is not None and threads < 1:
        raise UserInputError(f"--threads is {threads}, wanted at least 1")
    path = locate(path)
    chosen = choose_provider(provider)
    checked = checked or inspect(path)
    _check_memory(checked)
    config = _with_activations(checked, config)
    if chosen == "cpu":
        return _open(path, "cpu", threads, config, kernels, checked, shared)
    try:
        return _open(path, "cuda", threads, config, kernels, checked)
    except ElsaError as error:
        if provider == "cuda":
            raise
        log.warning("CUDA is present but cannot run %s, using the CPU: %s", path, error)
        return _open(path, "cpu", threads, config, kernels, checked, shared)


def decoding_session(
    path: str | Path,
    threads: int | None = None,
    provider: str = "auto",
    checked: ModelFile | None = None,
    config: Mapping[str, str] | None = None,
    kernels: bool | Mapping[str, str] | None = None,
) -> Any:
    """A session for `Decoder`: as `session`, with shared caches where our kernels can have them.

    With the provider's option cache: shared, each input past_key_values.N is memory with room for
    tokens to come, and its present.N the same memory: nothing is copied from token to token. That
    is so for all caches of a model or for none; `shares_caches` tells.
    """
    checked = checked or inspect(locate(path))
    caches = {value.name for value in checked.inputs if value.name.startswith("past_key_values.")}
    if not caches:
        return session(path, threads, provider, checked, config, kernels)
    with _opening:
        opened = _session(path, threads, provider, checked, config, kernels, shared=True)
        found = sparse.shared_caches() if sparse.NAME in opened.get_providers() else set()
    if found == caches:
        _sharing.add(opened)
    elif found:  # of some only
        given = dict(kernels) | {"cache": "copied"} if isinstance(kernels, Mapping) else kernels
        opened = session(path, threads, provider, checked, config, given)
    return opened


def shares_caches(opened: Any) -> bool:
    """Whether a session's caches are memory with room, past and present in one."""
    return opened in _sharing


def note_shared_caches(opened: Any) -> None:
    """Of a session that was made elsewhere with the same options as one that shares."""
    _sharing.add(opened)


def _with_activations(
    model: ModelFile, config: Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """Session options with what the file says of activations, unless the caller says it.

    onnxruntime's option speaks for its own products and, as their default, for our kernels.

    Raises:
        UserInputError: the file says something else than integer or float32.
    """
    said = model.metadata.get(ACTIVATIONS)
    if said not in (None, "integer", "float32"):
        raise UserInputError(
            f"{model.path}: its metadata {ACTIVATIONS} is {said[:40]!r}, wanted integer or float32"
        )
    if said != "float32":
        return config  # rounding is what onnxruntime and our kernels do by themselves
    return EXACT | dict(config or {})


def choose_provider(provider: str) -> Literal["cpu", "cuda"]:
    """The provider to try: what was asked for, or by "auto" the GPU when there is a working one.

    Raises:
        UserInputError: it is not available; names those that are.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise UserInputError(f"--provider is {provider!r}, wanted auto, cpu or cuda")
    if provider == "cpu":
        return "cpu"
    missing = _why_no_cuda()
    if missing is None:
        return "cuda"
    if provider == "cuda":
        raise UserInputError(f"--provider cuda: {missing}; available here: cpu")
    return "cpu"


def provider_of(opened: Any) -> Literal["cpu", "cuda"]:
    """Where a session runs."""
    return "cuda" if _NAMES["cuda"] in opened.get_providers() else "cpu"


def usable_cores() -> int:
    """Cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def run_failure(error: Exception, path: str | Path) -> ElsaError:
    """An exception of a session's run as one sentence."""
    if isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate" in str(error):
        return ElsaError(f"{path}: out of memory while running; use shorter input")
    return ElsaError(f"{path}: onnxruntime cannot run it on this input: {_sentence(error)}")


def memory_limit_bytes() -> int | None:
    """Memory this process may use: the machine's, or its control group's when that is less."""
    limits: list[int] = []
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(name).read_text()))
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(("MemTotal:", "SwapTotal:")):
                limits.append(int(line.split()[1]) * 1024)
        *groups, total, swap = limits
        limits = [*groups, total + swap]
    return min(limits, default=None)


def _check_memory(model: ModelFile) -> None:
    """A sparse weight of few bytes can claim terabytes; onnxruntime would make it dense."""
    limit = memory_limit_bytes()
    if limit is not None and model.dense_bytes > limit:
        raise UserInputError(
            f"{model.path}: its weights take {model.dense_bytes} bytes in memory, but this machine "
            f"has {limit}; run it on a larger one"
        )


def _check_decoding(model: ModelFile) -> None:
    """Without our kernels, packed weights need many times their dense bytes while loading."""
    packed = [weight for weight in model.weights if weight.form == "packed"]
    needed = decode_bytes((weight.elements, dtype_bits(weight.dtype)) for weight in packed)
    limit = memory_limit_bytes()
    if limit is not None and needed > limit:
        raise UserInputError(
            f"{model.path}: stock onnxruntime needs about {needed} bytes to decode its packed "
            f"weights, but this machine has {limit}; unpack it (elsa-run unpack), or run it with "
            "elsa-compile's kernels"
        )


def _why_no_cuda() -> str | None:
    """None when a CUDA device and a CUDA build of onnxruntime are here, else what is missing."""
    ort = _onnxruntime()
    if _NAMES["cuda"] not in ort.get_available_providers():
        return "this onnxruntime is built without CUDA"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        return "there is no NVIDIA driver on this machine"
    return None if ready and count.value > 0 else "the NVIDIA driver finds no GPU"


def _onnxruntime() -> Any:
    """The package with its log off: what it has to say arrives as exceptions, and is said once."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserInputError(
            f"onnxruntime cannot be imported ({error}); install onnxruntime or onnxruntime-gpu"
        ) from None
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def _add_kernels(
    ort: Any, options: Any, kernels: bool | Mapping[str, str] | None, shared: bool
) -> bool:
    """Put our execution provider into session options; whether it was."""
    choice = sparse.wanted() if kernels is None else kernels
    if choice is False:
        return False
    given = dict(choice) if isinstance(choice, Mapping) else {}
    sparse.check_options(given)
    if shared:
        given = {"cache": "shared"} | given
    try:
        options.add_provider_for_devices(sparse.devices(ort), given)
    except UserInputError as error:
        if choice is not None:
            raise
        log.warning("sparse weights run as dense ones: %s", error)
        return False
    return True


def _open(
    path: Path,
    provider: str,
    threads: int | None,
    config: Mapping[str, str] | None,
    kernels: bool | Mapping[str, str] | None = False,
    checked: ModelFile | None = None,
    shared: bool = False,
) -> Any:
    """One attempt on one provider; never another one behind the caller's back."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # A renamed .ort file would go around the check, which reads ONNX only.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    # Providers stand either here or in the options.
    providers: list[str] | None = [_NAMES["cpu"]]
    model: str | bytes = str(path)
    if provider == "cuda":
        if checked is not None:
            rewritten = cuda_session.prepare(checked, options, kernels)
            if rewritten is None:
                _check_decoding(checked)
            model = rewritten or model
        providers = [_NAMES["cuda"], _NAMES["cpu"]]
        if hasattr(ort, "preload_dlls"):
            # The CUDA libraries of pip packages; what is missing shows when the session opens.
            with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
                ort.preload_dlls()
    elif _add_kernels(ort, options, kernels, shared):
        providers = None
    elif checked is not None:
        _check_decoding(checked)
    try:
        # onnxruntime would retry with other providers and print about it on standard output.
        opened = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:
        if provider == "cuda" and cuda_session.is_without_cuda(error):
            raise UserInputError(_NO_LIBRARIES) from None
        raise _load_failure(error, path) from None
    if provider == "cuda" and _NAMES["cuda"] not in opened.get_providers():
        raise UserInputError(_NO_LIBRARIES)
    _return_memory()
    return opened


def _return_memory() -> None:
    """Give what loading needed back to the system; glibc keeps freed memory otherwise."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _load_failure(error: Exception, path: Path) -> ElsaError:
    """An exception of InferenceSession() as one sentence with the right exit code."""
    text = _sentence(error)
    unknown = type(error).__name__ == "NotImplemented" or any(
        sign in text
        for sign in ("Unsupported model IR", "not a registered function/op", "is under development")
    )
    if unknown:
        return UnsupportedModelError(
            f"{path}: this onnxruntime does not support it: {text}; try a newer onnxruntime"
        )
    if isinstance(error, MemoryError) or "bad_alloc" in text:
        return UserInputError(f"{path}: not enough memory to load it")
    return UserInputError(f"{path}: onnxruntime refuses it: {text}")


def _sentence(error: Exception) -> str:
    """The first line of an onnxruntime message, without its code and the places in its sources."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0].removeprefix("[ONNXRuntimeError] : ")
    parts = text.split(" : ", 2)
    if len(parts) == 3 and parts[0].isdigit():
        text = parts[2]
    text = "".join(c if c.isprintable() else "?" for c in text).strip(" .:")
    return text if len(text) <= 300 else text[:297] + "..."


class _Callable(types.ModuleType):
    """elsa_compile.runtime.session("model.onnx"): module and function share their name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return session(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
