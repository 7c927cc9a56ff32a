"""What each ATen operator does to the dimensions that pass through it; see channels.

A rule ties dimensions or pins them. An operator without a rule pins everything it touches.
"""

from collections.abc import Callable
from typing import Any

import numpy
from torch import Tensor, fx

from elsa_compile.channel_layout import LAYOUT_RULES, argument, op_name
from elsa_compile.channels import Product, Ties

ELEMENTWISE = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "neg", "pow", "abs", "exp", "log", "sqrt", "rsqrt"),
        *("relu", "relu_", "silu", "silu_", "gelu", "tanh", "sigmoid", "leaky_relu", "elu", "mish"),
        *("hardtanh", "hardswish", "hardsigmoid", "softplus", "relu6", "selu", "celu", "clamp"),
        *("where", "ge", "gt", "le", "lt", "eq", "ne", "logical_and", "logical_or", "logical_not"),
        *("bitwise_and", "bitwise_or", "__and__", "__or__", "masked_fill", "maximum", "minimum"),
        *("cos", "sin", "erf", "square", "reciprocal", "add_", "mul_", "sub_", "div_"),
    }
)
# Same shape in and out, values kept.
UNCHANGED = frozenset(
    {
        *("dropout", "contiguous", "clone", "alias", "detach", "detach_", "to", "_to_copy"),
        *("type_as", "lift_fresh_copy", "dropout_", "feature_dropout", "float"),
    }
)
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "prod", "var", "std", "norm"})
_POOLS = frozenset(
    {
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("upsample_nearest2d", "upsample_bilinear2d"),
    }
)
_SILENT = frozenset({"sym_size", "_assert_tensor_metadata", "_assert_scalar", "_assert_async"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
_MATMULS = frozenset({"mm", "matmul", "bmm"})


def apply_rule(found: Ties, node: fx.Node) -> None:
    """Note what one node ties and pins."""
    name = op_name(node)
    if name in _SILENT or not _has_tensor(node):
        return
    rule = _RULES.get(name)
    if rule is not None:
        rule(found, node)
        return
    for value in (node, *node.all_input_nodes):
        found.pin_all(value, f"{name} ({node.name}) is not understood")


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
    )


def _elementwise(found: Ties, node: fx.Node) -> None:
    rank = len(found.shape(node))
    for source in node.all_input_nodes:
        shape = found.shape(source)
        for back in range(1, min(rank, len(shape)) + 1):
            if shape[-back] != 1:
                found.tie(node, (source, len(shape) - back), (node, rank - back))


def _product_operand(found: Ties, operand: Any) -> tuple[str, bool] | None:
    """(attribute, turned) when an operand is a weight, perhaps transposed or cast."""
    turned = False
    while isinstance(operand, fx.Node) and operand.op == "call_function":
        if op_name(operand) in ("t", "transpose", "permute", "numpy_T"):
            turned = not turned
        elif op_name(operand) not in UNCHANGED:
            return None
        operand = operand.args[0]
    if isinstance(operand, fx.Node) and operand.op == "get_attr":
        return found.attributes[str(operand.target)], turned
    return None


def _bias(found: Ties, value: Any) -> str | None:
    known = isinstance(value, fx.Node) and value.op == "get_attr"
    return found.attributes[str(value.target)] if known else None


def _linear(found: Ties, node: fx.Node) -> None:
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    rank = len(found.shape(node))
    for dim in range(rank - 1):
        found.tie(node, (x, dim), (node, dim))
    found.tie(node, (x, rank - 1), (weight, 1))
    found.tie(node, (weight, 0), (node, rank - 1))
    if isinstance(bias, fx.Node):
        found.tie(node, (bias, 0), (node, rank - 1))
    _note_product(found, node, weight, x, rank - 1, bias, rows_last=False)


def _note_product(
    found: Ties, node: fx.Node, weight: Any, x: fx.Node, last: int, bias: Any, rows_last: bool
) -> None:
    base = _product_operand(found, weight)
    if base is None or found.tensors[base[0]].dim() != 2:
        found.pin(x, len(found.shape(x)) - 1, f"{node.name} multiplies by a computed matrix")
        return
    rows = int(rows_last) ^ int(base[1])
    read, made = found.key(x, -1), found.key(node, last)
    found.products[node.name] = Product(
        node.name, base[0], rows, 1 - rows, read, made, _bias(found, bias)
    )


def _addmm(found: Ties, node: fx.Node) -> None:
    bias, x, weight = node.args[:3]
    assert isinstance(bias, fx.Node)
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if node.kwargs or len(found.shape(bias)) != 1:
        for value in (node, *node.all_input_nodes):
            found.pin_all(value, f"{node.name} is a scaled addmm")
        return
    found.tie(node, (x, 0), (node, 0))
    found.tie(node, (x, 1), (weight, 0))
    found.tie(node, (weight, 1), (node, 1))
    found.tie(node, (bias, 0), (node, 1))
    _note_product(found, node, weight, x, 1, bias, rows_last=True)


def _matmul(found: Ties, node: fx.Node) -> None:
    x, other = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(other, fx.Node)
    a, b, out = len(found.shape(x)), len(found.shape(other)), len(found.shape(node))
    if min(a, b, out) < 2:
        for value in (node, x, other):
            found.pin_all(value, f"{node.name} multiplies by a vector")
        return
    found.tie(node, (x, a - 2), (node, out - 2))
    found.tie(node, (other, b - 1), (node, out - 1))
    found.tie(node, (x, a - 1), (other, b - 2))
    for source, rank in ((x, a), (other, b)):
        for back in range(3, rank + 1):
            if found.size(source, rank - back) != 1:
                found.tie(node, (source, rank - back), (node, out - back))
    if b == 2:
        _note_product(found, node, other, x, out - 1, None, rows_last=True)
        return
    found.pin(x, a - 1, f"{node.name} sums over it")
    if a == b == 4 and found.size(node, 1):
        found.attention.add(found.key(node, 1))


def _convolution(found: Ties, node: fx.Node) -> None:
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    bias, padding = argument(node, 2, "bias"), argument(node, 4, "padding", 0)
    general = op_name(node) == "convolution"
    groups = int(argument(node, 8 if general else 6, "groups", 1))
    if _product_operand(found, weight) is None or (general and node.args[6]):
        for value in (node, x, weight):
            found.pin_all(value, f"{node.name} is transposed or has a computed kernel")
        return
    found.tie(node, (x, 0), (node, 0))
    found.tie(node, (weight, 0), (node, 1))
    found.convolved |= {found.key(node, 1), found.key(weight, 0)}
    if isinstance(bias, fx.Node):
        found.tie(node, (bias, 0), (node, 1))
    name = found.attributes[str(weight.target)]
    padded = padding not in (0, "valid") and any(
        p != 0 for p in (padding if isinstance(padding, (list, tuple)) else [padding])
    )
    columns: int | None = 1
    channels, out = found.size(x, 1), found.size(node, 1)
    if groups == 1:
        found.tie(node, (x, 1), (weight, 1))
    elif groups == channels and out is not None:
        columns, wide = None, out // groups
        found.tie(node, (x, 1), (node, 1), numpy.arange(out) // wide, numpy.arange(out))
    else:
        found.pin(x, 1, f"{node.name} is a grouped convolution")
        found.pin(node, 1, f"{node.name} is a grouped convolution")
    read, made = found.key(x, 1), found.key(node, 1)
    found.products[node.name] = Product(
        node.name, name, 0, columns, read, made, _bias(found, bias), padded
    )


def _batch_norm(found: Ties, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    for dim in range(len(found.shape(node))):
        found.tie(node, (x, dim), (node, dim))
    for value in node.all_input_nodes[1:]:
        found.tie(node, (value, 0), (node, 1))


def _normalised(found: Ties, node: fx.Node) -> None:
    """layer_norm, rms_norm, softmax: a statistic over some dimensions, the others pass."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    rank = len(found.shape(node))
    over: Any = argument(node, 1, "dim", -1)
    dims = [over % rank] if isinstance(over, int) else list(range(rank - len(over), rank))
    for dim in range(rank):
        found.tie(node, (x, dim), (node, dim))
        if dim in dims:
            found.pin(node, dim, f"{op_name(node)} ({node.name}) runs over all of it")
    for value in node.all_input_nodes[1:]:
        found.pin_all(value, f"{op_name(node)} ({node.name}) runs over all of it")


def _reduction(found: Ties, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    rank = len(found.shape(x))
    over: Any = argument(node, 1, "dim")
    over = list(range(rank)) if over is None else [over] if isinstance(over, int) else list(over)
    dims = {dim % rank for dim in over} or set(range(rank))
    keep = len(found.shape(node)) == rank
    out = 0
    for dim in range(rank):
        if dim in dims:
            found.pin(x, dim, f"{op_name(node)} ({node.name}) runs over all of it")
            out += keep
        else:
            found.tie(node, (x, dim), (node, out))
            out += 1


def _pool(found: Ties, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    for dim in range(2):
        found.tie(node, (x, dim), (node, dim))


def _attention(found: Ties, node: fx.Node) -> None:
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    mask = argument(node, 3, "attn_mask")
    rank = len(found.shape(node))
    for dim in range(rank - 1):
        found.tie(node, (query, dim), (node, dim))
    found.tie(node, (value, rank - 1), (node, rank - 1))
    found.tie(node, (query, rank - 1), (key, rank - 1))
    found.pin(query, rank - 1, f"{node.name} sums over it")
    if rank >= 3:
        heads = found.size(node, rank - 3)
        for source in (key, value):
            groups = found.size(source, rank - 3)
            if heads is not None and groups is not None:
                repeat = numpy.arange(heads) // (heads // groups)
                found.tie(node, (source, rank - 3), (node, rank - 3), repeat, numpy.arange(heads))
        found.attention.add(found.key(node, rank - 3))
    if isinstance(mask, fx.Node):
        shape = found.shape(mask)
        for back in range(3, min(len(shape), rank) + 1):
            if shape[-back] != 1:
                found.tie(node, (mask, len(shape) - back), (node, rank - back))


def _nothing(found: Ties, node: fx.Node) -> None:
    """Tied where its parts are taken out."""


_RULES: dict[str, Callable[[Ties, fx.Node], None]] = {
    **LAYOUT_RULES,
    **dict.fromkeys(ELEMENTWISE | UNCHANGED, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys(("layer_norm", "rms_norm", "softmax", "_softmax", "log_softmax"), _normalised),
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), _nothing),
    "linear": _linear,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "scaled_dot_product_attention": _attention,
}
