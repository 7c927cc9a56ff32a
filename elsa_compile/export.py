"""Program -> ONNX files: the torch half, then write_onnx.

re-export the edited graph -> torch.onnx -> optimise without folding weights -> fuse
-> names of dimensions -> fewer nodes -> write_onnx (layout, half precision, sparse encoding, files)
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from elsa_compile import tracing
from elsa_compile.attention_nodes import shorten_attention
from elsa_compile.errors import UnsupportedModelError
from elsa_compile.grouped_heads import group_heads
from elsa_compile.last_logits import let_logits_be_chosen
from elsa_compile.needless_nodes import drop_needless
from elsa_compile.past_length import measure_past_by_masks
from elsa_compile.program import Program
from elsa_compile.quantised_weights import QuantisedWeight
from elsa_compile.rotary_tables import widen_tables
from elsa_compile.sparse_encoding import Mode
from elsa_compile.write_onnx import Dtype, Format, WriteResult, write_onnx

log = logging.getLogger(__name__)

OPSET = 23


def export(
    program: Program,
    path: Path,
    *,
    dtype: Dtype = "fp32",
    mode: Mode = "auto",
    format: Format = "plain",
    metadata: Mapping[str, str] | None = None,
) -> WriteResult:
    """Write a program as an ONNX file, weights sparse-encoded.

    Args:
        program: not changed. For fp16 and bf16 call `round_to_half` before, so that it holds what
            the file will hold.
        path: the .onnx file.
        dtype: how weights are stored; arithmetic, inputs and outputs are float32 either way.
        mode: when sparse initializers are used.
        format: "packed" also packs weights.
        metadata: entries of the file's metadata_props.

    Raises:
        UnsupportedModelError: an operator that ONNX opset 23 cannot express; a weight that the
            exporter lost.
        UserInputError: a place that cannot be written.
    """
    model = to_ir(program)
    notes = []
    if program.kind == "decoder" and (why := let_logits_be_chosen(model)):
        notes.append(f"logits of all positions are computed, whatever is read: {why}")
    written = write_onnx(
        model,
        path,
        dtype=dtype,
        mode=mode,
        format=format,
        metadata=metadata,
        expected_weights=_names_in_graph(program),
        quantised=_quantised(program),
        parallel=program.parallel,
    )
    return replace(written, notes=(*notes, *written.notes))


def _quantised(program: Program) -> dict[str, QuantisedWeight]:
    """Whole numbers and scales of the weights that lie on a grid; their products are the values."""
    found = {}
    for name, grid in program.grids().items():
        weight = program.weights[name]
        scale = grid.scale.to(weight.parameter.device)
        grouped = weight.matrix().reshape(scale.shape[0], scale.shape[1], -1)
        steps = (grouped / scale[:, :, None]).round().to(torch.int8)
        integers = steps.reshape(weight.matrix_shape).cpu().numpy()
        found[name] = QuantisedWeight(integers, grid.scale.cpu().numpy(), grid.bits, grid.half)
    return found


def round_to_half(program: Program, dtype: Dtype) -> None:
    """Round matrices, convolutions and embeddings to what "fp16" or "bf16" can hold, in place.

    Quantised ones stay: the file holds their whole numbers and float32 scales.
    A value beyond the largest becomes infinite here and is reported by the writer's own check.
    """
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    grids = program.grids()
    for weight in program.weights.values():
        if weight.kind != "other" and weight.name not in grids:
            weight.parameter.data.copy_(weight.parameter.data.to(half))


def to_ir(program: Program) -> ir.Model:
    """The program as a dense ONNX model in memory, its weights still recognisable."""
    import onnxscript.optimizer
    from onnxscript.rewriter import onnx_fusions

    signature = program.signature
    with _silence():
        try:
            with torch.no_grad():
                exported = tracing.export(program.graph_module, signature)
                onnx_program = torch.onnx.export(
                    exported,
                    signature.args,
                    None,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=list(signature.input_names),
                    output_names=list(signature.output_names),
                    optimize=False,
                    verbose=False,
                )
        except Exception as error:  # torch.onnx raises several kinds, all meaning the same
            raise UnsupportedModelError(
                f"{program.source} cannot be written as ONNX: {_reason(error)}"
            ) from error
        assert onnx_program is not None
        model = onnx_program.model
        # Folding would turn small weights that are transposed, or read at fixed places as position
        # embeddings are, into nameless constants; a tied one into two.
        named = _names_in_graph(program)
        weights = {*named, *(alias for aliases in named.values() for alias in aliases)}
        onnxscript.optimizer.optimize_ir(model, should_fold=partial(_keep_weights, weights))
        onnx_fusions.fuse(model)
    _name_dimensions(model, signature.axes)
    drop_needless(model)
    group_heads(model)
    shorten_attention(model)
    measure_past_by_masks(model)
    widen_tables(model)
    return model


def _keep_weights(weights: Collection[str], node: ir.Node) -> bool | None:
    """False for a node that reads a weight: it must not be folded. None leaves it to the folder."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.name in weights:
            return False
    return None


def _names_in_graph(program: Program) -> dict[str, list[str]]:
    """For every weight matrix its canonical name and the names the exporter may have given it.

    Weights that no node reads are not exported and not asked for.
    """
    names: dict[str, list[str]] = {}
    nodes = program.graph_module.graph.nodes
    read = {str(node.target) for node in nodes if node.op == "get_attr" and node.users}
    targets: dict[int, list[str]] = {}
    for name, parameter in program.graph_module.named_parameters(remove_duplicate=False):
        targets.setdefault(id(parameter), []).append(name)
    for weight in program.weights.values():
        if weight.kind != "other" and read & {
            weight.attribute,
            *targets.get(id(weight.parameter), []),
        }:
            aliases = [weight.attribute, *targets.get(id(weight.parameter), []), *weight.aliases]
            names[weight.name] = [alias for alias in dict.fromkeys(aliases) if alias != weight.name]
    return names


def _name_dimensions(model: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Replace the tracer's symbols (s10, s10 + s27) by names people and runtimes know."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(str(value.name), {}).items():
            dim = None if value.shape is None else value.shape[axis]
            if isinstance(dim, ir.SymbolicDim):
                names.setdefault(str(dim.value), name)
    # The total length is a sum of two symbols, and a present tensor's length is that same sum.
    presents = [v for v in model.graph.outputs if str(v.name).startswith("present.")]
    for value in presents:
        dim = None if value.shape is None else value.shape[2]
        if isinstance(dim, ir.SymbolicDim):
            names.setdefault(str(dim.value), "total")
    values = [*model.graph.inputs, *model.graph.outputs]
    for node in model.graph:
        values.extend(node.outputs)
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and str(dim.value) in names:
                value.shape[axis] = names[str(dim.value)]
    for value in model.graph.inputs:
        for axis, name in axes.get(str(value.name), {}).items():
            if value.shape is not None and not isinstance(value.shape[axis], int):
                value.shape[axis] = name
    for value in presents:
        if value.shape is not None:
            value.shape[2] = "total"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's chatter (torchvision is missing, versions, progress) off the terminal."""
    logger = logging.getLogger("torch.onnx")
    more = [logging.getLogger(n) for n in ("onnxscript", "onnx_ir", "torch.export")]
    levels = [(each, each.level) for each in (logger, *more)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for each, _ in levels:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in levels:
                each.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: torch.onnx wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def describe_inputs(program: Program) -> dict[str, Any]:
    """Name -> (dtype, shape with names of dynamic axes) of the graph's inputs."""
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves(program.signature.args)
    out = {}
    for name, leaf in zip(program.signature.input_names, leaves, strict=True):
        axes = program.signature.axes.get(name, {})
        shape = [axes.get(i, size) for i, size in enumerate(leaf.shape)]
        out[name] = (str(leaf.dtype).removeprefix("torch."), shape)
    return out
