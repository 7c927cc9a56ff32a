"""What each ATen operator does to the dimensions that pass through it; see channels.

A rule ties dimensions or pins them. An operator without a rule pins everything it touches.
"""

from collections.abc import Callable
from typing import Any

import numpy
from torch import Tensor, fx

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
VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "_unsafe_view"})
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


def op_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default, `getitem` for the built-in."""
    text = str(node.target)
    if text.startswith("aten."):
        return text.split(".")[1]
    return getattr(node.target, "__name__", text)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a node, by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


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


def _transpose(found: Ties, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    rank = len(found.shape(x))
    order = list(range(rank))
    if op_name(node) == "permute":
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        one, two = (int(a) % rank for a in (node.args[1:3] if len(node.args) > 2 else (0, -1)))  # type: ignore[arg-type]
        order[one], order[two] = order[two], order[one]
    for out, dim in enumerate(order):
        found.tie(node, (x, dim), (node, out))


def _unsqueeze(found: Ties, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    rank = len(found.shape(node))
    at = int(node.args[1]) % rank  # type: ignore[arg-type]
    for dim in range(rank - 1):
        found.tie(node, (x, dim), (node, dim + (dim >= at)))


def _expand(found: Ties, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    shift = len(found.shape(node)) - len(found.shape(x))
    for dim, size in enumerate(found.shape(x)):
        if size != 1:
            found.tie(node, (x, dim), (node, dim + shift))


def _hints(node: fx.Node, found: Ties) -> list[int]:
    """Sizes as numbers; dynamic ones as of the example inputs."""
    if node.op == "get_attr":
        return [int(size or 0) for size in found.shape(node)]
    sizes = node.meta["val"].shape
    return [s if isinstance(s, int) else int(s.node.hint or 0) for s in sizes]


def _view(found: Ties, node: fx.Node) -> None:
    """Dimensions merge and split: whole blocks of the inner ones go with the outermost."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    for ins, outs in _blocks(_hints(x, found), _hints(node, found)):
        if len(ins) == len(outs) == 1:
            found.tie(node, (x, ins[0]), (node, outs[0]))
            continue
        fixed = [found.size(x, d) for d in ins] + [found.size(node, d) for d in outs]
        if None in fixed or not ins or not outs:
            for value, dims in ((x, ins), (node, outs)):
                for dim in dims:
                    found.pin(value, dim, f"{node.name} merges it with a dynamic dimension")
            continue
        _tie_outer(found, node, x, ins, outs)


def _tie_outer(found: Ties, node: fx.Node, x: fx.Node, ins: list[int], outs: list[int]) -> None:
    """Tie the outermost dimensions of a merge or split in units of the coarser one."""
    a, b = int(found.size(x, ins[0]) or 1), int(found.size(node, outs[0]) or 1)
    count = min(a, b)
    for value, dims in ((x, ins), (node, outs)):
        for dim in dims[1:]:
            found.pin(value, dim, f"{node.name} merges it into another dimension")
    if max(a, b) % count:
        found.pin(x, ins[0], f"{node.name} regroups it")
        found.pin(node, outs[0], f"{node.name} regroups it")
        return
    wide = numpy.arange(max(a, b))
    found.tie(
        node, (x, ins[0]), (node, outs[0]), wide // (max(a, b) // a), wide // (max(a, b) // b)
    )


def _blocks(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of runs of dimensions with equal products; dimensions of size 1 are left out.

    >>> _blocks([2, 3, 32], [6, 4, 8])
    [([0, 1], [0]), ([2], [1, 2])]
    """
    left = [i for i, size in enumerate(before) if size != 1]
    right = [i for i, size in enumerate(after) if size != 1]
    pairs: list[tuple[list[int], list[int]]] = []
    while left or right:
        ins, outs, a, b = [], [], 1, 1
        while True:
            if left and (a <= b or not right):
                ins.append(left.pop(0))
                a *= before[ins[-1]]
            elif right:
                outs.append(right.pop(0))
                b *= after[outs[-1]]
            if a == b or not (left or right):
                break
        pairs.append((ins, outs))
    return pairs


def _cat(found: Ties, node: fx.Node) -> None:
    tensors: Any = node.args[0]
    rank = len(found.shape(node))
    along = int(argument(node, 1, "dim", 0)) % rank
    start: int | None = 0
    for source in tensors:
        shape = found.shape(source)
        if len(shape) != rank:  # the empty cache that a decoder starts from
            continue
        for dim in range(rank):
            if dim != along:
                found.tie(node, (source, dim), (node, dim))
        size = shape[along]
        if size is None or start is None or found.size(node, along) is None:
            start = None
            found.pin(source, along, f"{node.name} joins it to a dynamic size")
            continue
        entries = numpy.arange(size)
        found.tie(node, (source, along), (node, along), entries, entries + start)
        start += size


def slice_bounds(found: Ties, node: fx.Node) -> tuple[int, int, int] | None:
    """(dimension, start, end) of a slice with fixed bounds along a fixed size, else None."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    dim = int(argument(node, 1, "dim", 0)) % len(found.shape(x))
    size = found.size(x, dim)
    start, end = argument(node, 2, "start", 0) or 0, argument(node, 3, "end")
    end = size if end is None else end
    step = argument(node, 4, "step", 1)
    if size is None or step != 1 or not isinstance(start, int) or not isinstance(end, int):
        return None
    start = max(start + size, 0) if start < 0 else min(start, size)
    end = max(end + size, 0) if end < 0 else min(end, size)
    return dim, start, max(end, start)


def _slice(found: Ties, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    bounds = slice_bounds(found, node)
    along = int(argument(node, 1, "dim", 0)) % len(found.shape(x))
    for dim in range(len(found.shape(x))):
        if dim != along:
            found.tie(node, (x, dim), (node, dim))
    if bounds is None:
        found.pin(x, along, f"{node.name} cuts it at computed places")
        found.pin(node, along, f"{node.name} cuts it at computed places")
        return
    _, start, end = bounds
    entries = numpy.arange(end - start)
    found.tie(node, (x, along), (node, along), entries + start, entries)


def split_dim(node: fx.Node) -> int:
    """The dimension that split and chunk cut."""
    return int(argument(node, 2, "dim", 0))


def _getitem(found: Ties, node: fx.Node) -> None:
    parent, index = node.args
    assert isinstance(parent, fx.Node)
    assert isinstance(index, int)
    if op_name(parent) not in ("split", "chunk", "split_with_sizes"):
        found.pin_all(node, f"it is a part of {parent.name}")
        return
    x = parent.args[0]
    assert isinstance(x, fx.Node)
    rank = len(found.shape(node))
    along = split_dim(parent) % rank
    for dim in range(rank):
        if dim != along:
            found.tie(node, (x, dim), (node, dim))
    parts = [value.shape[along] for value in parent.meta["val"]]
    if not all(isinstance(part, int) for part in parts):
        found.pin(x, along, f"{parent.name} cuts it at computed places")
        found.pin(node, along, f"{parent.name} cuts it at computed places")
        return
    entries = numpy.arange(parts[index])
    found.tie(node, (x, along), (node, along), entries + sum(parts[:index]), entries)


def _nothing(found: Ties, node: fx.Node) -> None:
    """Tied where its parts are taken out."""


_RULES: dict[str, Callable[[Ties, fx.Node], None]] = {
    **dict.fromkeys(ELEMENTWISE | UNCHANGED, _elementwise),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys(("transpose", "permute", "t", "numpy_T"), _transpose),
    **dict.fromkeys(("layer_norm", "rms_norm", "softmax", "_softmax", "log_softmax"), _normalised),
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), _nothing),
    "linear": _linear,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "unsqueeze": _unsqueeze,
    "squeeze": _view,
    "expand": _expand,
    "cat": _cat,
    "slice": _slice,
    "getitem": _getitem,
}
