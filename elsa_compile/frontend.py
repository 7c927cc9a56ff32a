"""Any input -> Program. The only place that loads models.

    folder or hub id   Hugging Face model (hub_models)
    .gguf              through transformers, dequantised (hub_models)
    .pt2               exported program
    .pt .pth .safetensors   checkpoint: state dict with its config (checkpoints)
    nn.Module          from Python, with example inputs

Reading any of these is reading hostile input: nothing here runs code from a file, except a pickled
module under `allow_pickle`.
"""

import logging
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elsa_compile import tracing
from elsa_compile.errors import UnsupportedModelError, UserInputError
from elsa_compile.program import Program, Signature

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = ".pt2, .pt, .pth, .safetensors, .gguf"


def load(
    model: str | Path | nn.Module,
    example_inputs: tuple[Tensor, ...] | None = None,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
) -> Program:
    """Load and trace a model.

    Args:
        model: a folder, hub id, file, or nn.Module.
        example_inputs: for a module that is not from transformers, or a pickled one; the first
            dimension of each is the batch.
        config: folder (or JSON file) with the configuration of a checkpoint that brings none; no
            other kind of model takes one.
        tokenizer: folder with tokenizer.json, when it is not the model's.
        allow_pickle: open pickled modules, which runs whatever code they hold.

    Returns:
        The traced program; `folder` is where config and tokenizer are.

    Raises:
        UserInputError: missing, truncated or contradictory files, values that are not finite.
        UnsupportedModelError: an architecture or construct that cannot be traced.
    """
    if isinstance(model, nn.Module):
        program = from_module(model, example_inputs)
    else:
        program = _from_path(str(model), example_inputs, config, allow_pickle)
    if tokenizer is not None:
        folder = Path(tokenizer)
        if not (folder / "tokenizer.json").is_file():
            raise UserInputError(f"--tokenizer: {folder} holds no tokenizer.json")
        program.folder = folder
    _drop_unread(program)
    check_finite(program)
    return program


def _from_path(
    text: str,
    example_inputs: tuple[Tensor, ...] | None,
    config: str | Path | None,
    allow_pickle: bool,
) -> Program:
    from elsa_compile import checkpoints, hub_models

    path = Path(text)
    is_checkpoint = path.suffix in (".pt", ".pth", ".bin", ".safetensors") and path.is_file()
    if config is not None and path.exists() and not is_checkpoint:
        raise UserInputError(
            f"--config goes with a checkpoint (.pt, .pth, .safetensors); {path} brings its own "
            "configuration, leave it out"
        )
    if path.is_dir():
        return _traced(hub_models.from_folder(path), path, path.name)
    if path.suffix == ".onnx" and path.is_file():
        raise UserInputError(f"{path} is an ONNX file already; give the PyTorch model it came from")
    if path.suffix == ".gguf" and path.is_file():
        return _traced(*hub_models.from_gguf(path), path.name)
    if path.suffix == ".pt2" and path.is_file():
        return from_exported_file(path)
    if is_checkpoint:
        module, folder = checkpoints.load(path, config, allow_pickle)
        return _traced(module, folder, path.name, example_inputs)
    if path.exists():
        raise UserInputError(
            f"{path} is no model this compiler reads; give a Hugging Face folder or one of "
            f"{_SUFFIXES}"
        )
    if _HUB_ID.fullmatch(text) and path.suffix not in _SUFFIXES.split(", "):
        folder = hub_models.download(text)
        return _traced(hub_models.from_folder(folder), folder, text)
    raise UserInputError(f"model {text} does not exist")


def _traced(
    module: nn.Module,
    folder: Path | None,
    source: str,
    example_inputs: tuple[Tensor, ...] | None = None,
) -> Program:
    check_finite_module(module, source)
    program = from_module(module, example_inputs)
    program.folder, program.source = folder, source
    return program


def from_module(module: nn.Module, example_inputs: tuple[Tensor, ...] | None = None) -> Program:
    """Trace a module: as decoder or encoder when transformers says so, else from its inputs.

    Raises:
        UserInputError: it needs example inputs.
        UnsupportedModelError: it cannot be traced.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise UserInputError(TORCHSCRIPT.format(what=type(module).__name__))
    floating = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if floating - {torch.float32}:
        # One dtype through the compiler: half-precision sums of 1000s of terms differ from
        # onnxruntime's by more than any useful tolerance. `--dtype fp16` stores halves again.
        log.info("computing in float32; the model was in %s", ", ".join(map(str, floating)))
        module = module.float()
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "model_type") and example_inputs is None:
        causal = is_causal(module)
        program = tracing.trace_decoder(module) if causal else tracing.trace_encoder(module)
        program.config = config.to_dict()
        return program
    if example_inputs is None:
        raise UserInputError(
            f"{type(module).__name__} needs example inputs to be traced; pass example_inputs= a "
            "tuple of tensors whose first dimension is the batch from Python, or save it with "
            "torch.export.save(torch.export.export(module, inputs), 'model.pt2')"
        )
    return tracing.trace_generic(module, tuple(example_inputs))


def is_causal(module: nn.Module) -> bool:
    """True for a causal language model of transformers: it generates and has a head."""
    can = getattr(module, "can_generate", None)
    head = getattr(module, "get_output_embeddings", None)
    is_encoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
    return not is_encoder and can is not None and can() and head is not None and head() is not None


TORCHSCRIPT = (
    "{what} is a TorchScript archive, which torch.export cannot trace; save the state dict of the "
    "original module, or torch.export.save(torch.export.export(module, inputs), 'model.pt2')"
)


# --- Exported programs --------------------------------------------------------------------


def from_exported_file(path: Path) -> Program:
    """Open a .pt2 file."""
    import io

    try:
        # From memory: given a bad file by name, torch leaves its reader to print on its own.
        data = path.read_bytes()
        if not zipfile.is_zipfile(io.BytesIO(data)):
            raise ValueError("not a complete zip archive")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_sums(archive)
        exported = torch.export.load(io.BytesIO(data))
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise UserInputError(
            f"{path} cannot be read as an exported program: {_first_line(error)}; it is truncated, "
            "corrupted or written by another torch release"
        ) from error
    program = from_exported(exported)
    program.source = path.name
    if (path.parent / "tokenizer.json").is_file():
        program.folder = path.parent
    return program


def from_exported(exported: torch.export.ExportedProgram) -> Program:
    """Wrap an exported program of any model; it keeps the dynamic dimensions it was given."""
    args, kwargs = exported.example_inputs or ((), {})
    if kwargs:
        raise UnsupportedModelError(
            f"the exported program takes keyword inputs ({', '.join(kwargs)}); export it with "
            "positional inputs"
        )
    leaves = pytree.tree_leaves(args)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise UnsupportedModelError(
            "the exported program has no tensor example inputs, or inputs that are no tensors"
        )
    if any(not isinstance(leaf, Tensor) for leaf in args):
        raise UnsupportedModelError("the exported program takes nested inputs; use plain tensors")
    names = list(exported.graph_signature.user_inputs)
    count = len(exported.graph_signature.user_outputs)
    outputs = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    holders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    axes: dict[str, dict[int, str]] = {}
    shapes: list[Any] = []
    for name in names:
        sizes = holders[name].meta["val"].shape
        symbols = {i: str(size) for i, size in enumerate(sizes) if not isinstance(size, int)}
        axes[str(name)] = {i: "batch" if i == 0 else symbol for i, symbol in symbols.items()}
        shapes.append({i: torch.export.Dim.AUTO for i in symbols} or None)
    signature = Signature(tuple(args), tuple(shapes), [str(n) for n in names], outputs, axes)
    return tracing.from_exported(exported, signature, "generic")


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).strip().split("\n")[0].split())
    return text[:200] or type(error).__name__


def check_sums(archive: zipfile.ZipFile) -> None:
    """Compare every member of a torch archive with its checksum, which torch itself does not.

    Raises:
        ValueError: names the first that differs.
    """
    try:
        bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(_first_line(error)) from None
    if bad is not None:
        raise ValueError(
            f"the checksum of {bad} does not fit (torch.save writes none under "
            "torch.serialization.set_crc32_options(False))"
        )


# --- What nothing reads -------------------------------------------------------------------


def _drop_unread(program: Program) -> None:
    """Forget weights that no output depends on, as the pooler behind an encoder's hidden states.

    They are neither exported nor worth pruning, and would count as zeros or as dense bytes.
    """
    waiting = [node for node in program.graph_module.graph.nodes if node.op == "output"]
    seen = set(waiting)
    while waiting:
        fresh = [node for node in waiting.pop().all_input_nodes if node not in seen]
        seen.update(fresh)
        waiting += fresh
    read = {str(node.target) for node in seen if node.op == "get_attr"}
    named = program.graph_module.named_parameters(remove_duplicate=False)
    kept = {id(parameter) for name, parameter in named if name in read}
    unread = [n for n, w in program.weights.items() if id(w.parameter) not in kept]
    for name in unread:
        del program.weights[name]
    if unread:
        log.info("%s: no output depends on %d weights; left out", program.source, len(unread))


# --- Finite values ------------------------------------------------------------------------


def check_finite(program: Program) -> None:
    """Raise UserInputError when a weight or a statistic of a normalisation is not finite."""
    named = {weight.name: weight.parameter for weight in program.weights.values()}
    _check_tensors(named, dict(program.graph_module.named_buffers()), program.source)


def check_finite_module(module: nn.Module, source: str) -> None:
    """The same before tracing, which may run the model."""
    _check_tensors(dict(module.named_parameters()), dict(module.named_buffers()), source)


def _odd_values(value: Tensor, is_buffer: bool) -> int:
    """How many values of a tensor are not finite; a buffer may hold the infinities of a mask."""
    if not value.is_floating_point():
        return 0
    odd = torch.isnan(value.detach()) if is_buffer else ~torch.isfinite(value.detach())
    return int(odd.sum())


def _check_tensors(
    weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], source: str
) -> None:
    counts = {name: _odd_values(value, False) for name, value in weights.items()}
    for name, value in buffers.items():
        counts[name] = _odd_values(value, not name.endswith(("running_mean", "running_var")))
    bad = [name for name, count in counts.items() if count]
    if bad:
        count = counts[bad[0]]
        more = f", and {len(bad) - 1} more weights do too" if len(bad) > 1 else ""
        raise UserInputError(f"{source}: {bad[0]} holds {count} NaN or infinite values{more}")
