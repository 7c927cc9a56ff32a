"""What operators that only move entries do to dimensions: views, transposes, cuts and joins.

Beside `channel_rules`, which has the operators that compute.
"""

from collections.abc import Callable
from typing import Any

import numpy
from torch import fx

from elsa_compile.channels import Ties

VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "_unsafe_view"})


def op_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default, `getitem` for the built-in."""
    text = str(node.target)
    if text.startswith("aten."):
        return text.split(".")[1]
    return getattr(node.target, "__name__", text)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a node, by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


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


LAYOUT_RULES: dict[str, Callable[[Ties, fx.Node], None]] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(("transpose", "permute", "t", "numpy_T"), _transpose),
    "unsqueeze": _unsqueeze,
    "squeeze": _view,
    "expand": _expand,
    "cat": _cat,
    "slice": _slice,
    "getitem": _getitem,
}
