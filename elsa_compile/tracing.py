"""nn.Module -> Program: torch.export with dynamic shapes, and which weight does what.

A decoder is traced through a wrapper that takes the KV cache as flat tensors, so that one graph
serves prefill and decode. The explicit position_ids matter: without them the RotaryEmbedding nodes
of opset 23 keep batch 1 in onnxruntime.
"""

import linecache
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from elsa_compile.errors import UnsupportedModelError
from elsa_compile.program import Kind, Program, Signature, Weight, WeightKind

WRAPPED = "model."  # prefix that the wrappers below give every name

aten = torch.ops.aten
_LINEAR = {aten.linear.default}
_MATMUL = {aten.mm.default, aten.matmul.default, aten.bmm.default}
_ADDMM = {aten.addmm.default}
_CONV = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv2d.padding,
    aten.conv1d.padding,
    aten.convolution.default,
}
_TRANSPOSE = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
_VIEW = {aten.view.default, aten.reshape.default, aten.alias.default, aten.detach.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.type_as.default}


class CachedDecoder(nn.Module):
    """A language model whose KV cache goes in and out as flat tensors.

    Inputs: input_ids (B, S), attention_mask (B, P + S), position_ids (B, S), all int64, and 2 L
    tensors (B, kv_heads, P, head_dim): key, value of each layer. Outputs: logits (B, S, V) and the
    2 L extended tensors (B, kv_heads, P + S, head_dim).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Extend the cache by S tokens and return their logits."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return out.logits, present


class NamedOutputs(nn.Module):
    """An encoder called with keyword inputs; returns its tensor outputs as a tuple."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of `outputs`."""
        result = self.model(**dict(zip(self.inputs, args, strict=True)))
        return tuple(result[name] for name in self.outputs)


def trace_decoder(model: Any) -> Program:
    """Trace a Hugging Face causal language model with its KV cache."""
    model.eval()
    layers, heads, head_dim = cache_geometry(model)
    batch, new, past = 2, 3, 5
    cache = [
        torch.zeros(batch, heads, past, head_dim, dtype=_dtype(model)) for _ in range(2 * layers)
    ]
    args = (
        torch.arange(batch * new).reshape(batch, new) % model.config.vocab_size,
        torch.ones(batch, past + new, dtype=torch.long),
        torch.arange(past, past + new).expand(batch, new).contiguous(),
        cache,
    )
    two = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = (two, two, two, [{0: Dim.AUTO, 2: Dim.AUTO}] * (2 * layers))
    pairs = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    past_names = [f"past_key_values.{pair}" for pair in pairs]
    axes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "sequence"},
        **{name: {0: "batch", 2: "past"} for name in past_names},
    }
    signature = Signature(
        args,
        shapes,
        ["input_ids", "attention_mask", "position_ids", *past_names],
        ["logits", *(f"present.{pair}" for pair in pairs)],
        axes,
    )
    return _trace(CachedDecoder(model), model, signature, "decoder")


def cache_geometry(model: nn.Module) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the cache that the model itself builds."""
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long)
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    found: list[Any] = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", [])]
    if not found or not all(isinstance(k, Tensor) and k.dim() == 4 for k in found):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its cache is not one key and one value tensor (batch, "
            "heads, length, width) a layer, the only kind this release exports"
        )
    if len({tuple(k.shape) for k in found}) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its layers have caches of many shapes"
        )
    return len(found), found[0].shape[1], found[0].shape[3]


def trace_encoder(model: Any) -> Program:
    """Trace a Hugging Face encoder: input_ids, attention_mask (and token_type_ids) in."""
    import inspect

    model = model.eval()
    accepted = inspect.signature(model.forward).parameters
    names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in accepted]
    batch, length = 2, 7
    ids = torch.arange(batch * length).reshape(batch, length) % model.config.vocab_size
    filled = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    filled["token_type_ids"] = torch.zeros_like(ids)
    args = tuple(filled[name] for name in names)
    with torch.no_grad():
        result = model(**{name: filled[name] for name in names})
    outputs = [name for name, value in result.items() if isinstance(value, Tensor)]
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in names)
    signature = Signature(args, shapes, names, outputs, axes)
    return _trace(NamedOutputs(model, names, outputs), model, signature, "encoder")


def trace_generic(
    model: nn.Module, example_inputs: tuple[Tensor, ...], dynamic_batch: bool = True
) -> Program:
    """Trace any module with tensor inputs; the first dimension of every input is the batch."""
    import inspect

    args = tuple(_batch_of_two(x) for x in example_inputs)
    names = [n for n in inspect.signature(model.forward).parameters][: len(args)]
    if len(names) < len(args) or names[:1] == ["args"]:
        names = [f"input_{i}" for i in range(len(args))]
    shapes = tuple({0: Dim.AUTO} if x.dim() else None for x in args)
    axes = {name: {0: "batch"} for name, x in zip(names, args, strict=True) if x.dim()}
    with torch.no_grad():
        result = model.eval()(*args)
    count = 1 if isinstance(result, Tensor) else len(result)
    outputs = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    signature = Signature(args, shapes if dynamic_batch else None, names, outputs, axes)
    return _trace(model, model, signature, "generic", wrapped=False)


def _has_varargs(model: nn.Module) -> bool:
    import inspect

    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _batch_of_two(x: Tensor) -> Tensor:
    """torch.export takes a dimension of 1 for a constant: example batches need two rows."""
    return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def export(module: nn.Module, signature: Signature) -> torch.export.ExportedProgram:
    """torch.export with the flags under which a second trace of the result also works."""
    shapes = signature.dynamic_shapes
    if shapes is not None and _has_varargs(module):
        shapes = (shapes,)  # they count as one input; a traced module names them one by one
    return torch.export.export(
        module,
        signature.args,
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _trace(
    traced: nn.Module, module: nn.Module, signature: Signature, kind: Kind, wrapped: bool = True
) -> Program:
    try:
        exported = export(traced, signature)
    except Exception as error:  # torch.export raises nearly every type there is
        raise UnsupportedModelError(_trace_failure(module, error)) from error
    program = from_exported(exported, signature, kind, WRAPPED if wrapped else "", module)
    program.source = type(module).__name__
    return program


def _trace_failure(module: nn.Module, error: Exception) -> str:
    """One sentence naming the submodule, the source line and the construct."""
    names = {id(child): name or type(module).__name__ for name, child in module.named_modules()}
    where, line = type(module).__name__, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in names and isinstance(owner, nn.Module):
            where = names[id(owner)]
            path = Path(frame.f_code.co_filename)
            line = f" at {path.name}:{number}"
            source = linecache.getline(str(path), number).strip()
            line += f" (`{source}`)" if source else ""
    reason = " ".join(str(error).strip().split("\n")[0].split()) or type(error).__name__
    return (
        f"{type(module).__name__} cannot be traced: module {where}{line}: {reason[:300]}; rewrite "
        "that construct so that torch.export accepts it (docs/inputs.md)"
    )


def from_exported(
    exported: torch.export.ExportedProgram,
    signature: Signature,
    kind: Kind,
    prefix: str = "",
    module: nn.Module | None = None,
) -> Program:
    """Wrap an exported program: plain GraphModule, canonical weights, input checks stripped."""
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    graph_module._forward_pre_hooks.clear()  # they pin sizes of the example, as "at least 4"
    if module is not None:
        _share(graph_module, module, prefix)
    weights = find_weights(graph_module, prefix, module)
    return Program(graph_module, signature, kind, weights, module=module)


def _share(graph_module: fx.GraphModule, module: nn.Module, prefix: str) -> None:
    """Make sure that both views hold the same Parameter objects."""
    own = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in graph_module.named_parameters():
        original = own.get(name.removeprefix(prefix))
        assert original is parameter, f"{name} was copied by the trace"


# --- Which weight does what ---------------------------------------------------------------


def find_weights(
    graph_module: fx.GraphModule, prefix: str = "", module: nn.Module | None = None
) -> dict[str, Weight]:
    """Canonical weights in graph order: one for each Parameter, however often it is tied."""
    order: dict[int, tuple[nn.Parameter, list[fx.Node]]] = {}
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        value = _attribute(graph_module, str(node.target))
        if isinstance(value, nn.Parameter):
            order.setdefault(id(value), (value, []))[1].append(node)
    names: dict[int, list[str]] = {}
    for name, parameter in (module or graph_module).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    head = _head_node(graph_module)
    types = {n: type(m).__name__ for n, m in module.named_modules()} if module else {}
    weights: dict[str, Weight] = {}
    for key, (parameter, nodes) in order.items():
        own = names.get(key) or [str(nodes[0].target).removeprefix(prefix)]
        kind, transposed, uses = _kind(parameter, nodes)
        type_name = types.get(own[0].rpartition(".")[0], "")
        weights[own[0]] = Weight(
            name=own[0],
            attribute=str(nodes[0].target),
            parameter=parameter,
            kind=kind,
            transposed=transposed,
            is_head=parameter.dim() > 1 and head is not None and head in uses,
            type_name=type_name or {"linear": "Linear", "conv": "Conv"}.get(kind, kind),
            aliases=tuple(own[1:]),
        )
    return weights


def _attribute(owner: Any, target: str) -> Any:
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def _uses(node: fx.Node, turned: bool = False) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """(user, operand, turned) of a weight, seen through transposes, casts and views."""
    for user in node.users:
        if user.op != "call_function":
            continue
        if user.target in _TRANSPOSE:
            yield from _uses(user, not turned)
        elif user.target in _VIEW | _CASTS:
            yield from _uses(user, turned)
        else:
            yield user, node, turned


def _kind(
    parameter: nn.Parameter, nodes: Iterable[fx.Node]
) -> tuple[WeightKind, bool, set[fx.Node]]:
    """(kind, stored as (K, N)?, user nodes) from what the graph does with a weight."""
    found: set[tuple[WeightKind, bool]] = set()
    users: set[fx.Node] = set()
    for node in nodes:
        for user, operand, turned in _uses(node):
            users.add(user)
            found.add(_use(user, operand, turned))
    if parameter.dim() < 2 or parameter.numel() == 0:
        return "other", False, users
    if ("embedding", False) in found:
        return "embedding", False, users
    if len(found) == 1:
        kind, transposed = found.pop()
        if kind == "linear" and parameter.dim() != 2:
            return "other", False, users
        return kind, transposed, users
    return "other", False, users


def _use(user: fx.Node, operand: fx.Node, turned: bool) -> tuple[WeightKind, bool]:
    if user.target in _LINEAR and user.args[1] is operand and not turned:
        return "linear", False
    if user.target in _CONV and user.args[1] is operand and not turned:
        # A transposed convolution stores (in, out/groups, ...): its rows are not outputs.
        if user.target is aten.convolution.default and user.args[6]:
            return "other", False
        return "conv", False
    if user.target is aten.embedding.default and user.args[0] is operand:
        return "embedding", False
    if user.target in _ADDMM and user.args[2] is operand:
        return "linear", not turned
    if user.target in _MATMUL and user.args[1] is operand:
        return "linear", not turned
    return "other", False


def _head_node(graph_module: fx.GraphModule) -> fx.Node | None:
    """The product behind the first output, when no other product lies between: the head."""
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    sources = output.all_input_nodes
    node = sources[0] if sources else None
    products = _LINEAR | _MATMUL | _ADDMM
    while node is not None and node.op == "call_function" and node.target not in products:
        if node.target is aten.layer_norm.default or len(node.all_input_nodes) > 2:
            return None
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return node if node is not None and node.op == "call_function" else None
