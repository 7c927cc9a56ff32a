"""Take units out of a program: weights, plans, the traced graph, the module and the config.

Every change notes how to undo it, so that a removal whose result does not compute what it should
leaves the program as it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, fx

from elsa_compile.channel_layout import VIEWS, op_name, slice_bounds, split_dim
from elsa_compile.channel_rules import CONVOLUTIONS
from elsa_compile.channels import Indices, Key, Ties, Units
from elsa_compile.passes.allocation import sparsity_of
from elsa_compile.patterns import NM, Block, Neurons, Unstructured
from elsa_compile.program import Program, Weight, WeightPlan

Undo = list[Callable[[], None]]
Kept = dict[Key, Indices]  # dimension -> the entries that stay, ascending


def kept_entries(groups: list[Units], gone: list[Tensor]) -> Kept:
    """Entries that stay of every dimension that loses some.

    Args:
        groups: of units.
        gone: for each (count,) bool, the units to remove.
    """
    kept: Kept = {}
    for group, dead in zip(groups, gone, strict=True):
        if not bool(dead.any()):
            continue
        for key, labels in group.labels.items():
            kept[key] = numpy.flatnonzero(~dead.numpy()[labels])
    return kept


def remove(found: Ties, kept: Kept, undo: Undo) -> None:
    """Shrink everything that has one of these dimensions.

    Args:
        found: of the program as it is.
        kept: what stays.
        undo: gets how to go back, to be called from its end.
    """
    program = found.program
    undo.append(lambda: _recompile(program))
    edits = [_edit(found, node, kept) for node in program.graph_module.graph.nodes]
    _shrink_plans(found, kept, undo)
    for name, tensor in found.tensors.items():
        value = tensor.data
        for dim in range(value.dim()):
            if (name, dim) in kept:
                value = value.index_select(dim, torch.from_numpy(kept[name, dim]))
        if value is not tensor.data:
            set_data(tensor, value.contiguous(), undo)
    for edit in edits:
        if edit is not None:
            _apply(edit, undo)
    _shrink_signature(found, kept, undo)
    program.graph_module.recompile()


def _recompile(program: Program) -> None:
    program.graph_module.recompile()


def set_data(tensor: Tensor, value: Tensor, undo: Undo) -> None:
    """Give a parameter or buffer other values, perhaps of another shape."""
    old = tensor.data
    tensor.grad = None

    def back() -> None:
        tensor.data = old

    undo.append(back)
    tensor.data = value


def set_attribute(owner: Any, name: str, value: Any, undo: Undo) -> None:
    """`owner.name = value`, undone by what was there."""
    old = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, value)


# --- Plans --------------------------------------------------------------------------------


def _matrix_entries(found: Ties, weight: Weight, kept: Kept) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the matrix (N, K) that stay."""
    name = found.attributes[weight.attribute]
    shape = weight.parameter.shape
    n, k = (1, 0) if weight.transposed else (0, 1)
    sides = []
    for dim in (n, k):
        entries = kept.get((name, dim), numpy.arange(shape[dim]))
        sides.append(torch.from_numpy(entries))
    if weight.kind == "conv":
        kernel = int(weight.parameter[0, 0].numel())
        sides[1] = (sides[1][:, None] * kernel + torch.arange(kernel)).reshape(-1)
    return sides[0], sides[1]


def shrunk_plan(found: Ties, weight: Weight, plan: WeightPlan, kept: Kept) -> WeightPlan | str:
    """The plan of what stays of a weight, or why it cannot be: its pattern would break."""
    rows, columns = _matrix_entries(found, weight, kept)
    shape = (len(rows), len(columns))
    result = replace(plan, shape=shape, emptied=None)  # its rows have other numbers now
    if plan.skipped is None and (problem := plan.pattern.problem(shape)) is not None:
        return f"the rest of {weight.name} {problem}"
    if plan.grid is not None:
        if plan.grid.scale.shape[1] > 1 and columns.tolist() != list(range(plan.shape[1])):
            return f"{weight.name} is quantised in groups along its inputs"
        result.grid = replace(plan.grid, scale=plan.grid.scale[rows])
    if plan.mask is None:
        return result
    result.mask = plan.mask[rows][:, columns]
    if plan.skipped is None:
        if isinstance(plan.pattern, Neurons):
            result.pattern = _remaining_units(plan.pattern, plan.shape, shape)
        result.sparsity = min(plan.sparsity, _remaining(result, result.mask))
        violation = result.pattern.violation(result.mask, result.sparsity)
        if violation is not None:
            return f"the rest of {weight.name} breaks its pattern: {violation}"
    return result


def _remaining(plan: WeightPlan, mask: Tensor) -> float:
    """The sparsity that a shrunk mask still has."""
    pattern = plan.pattern
    zeros, total = int((~mask).sum()), mask.numel()
    if isinstance(pattern, NM):
        return plan.sparsity
    if isinstance(pattern, Unstructured) and pattern.per_row:
        zeros, total = int((~mask).sum(dim=1).min()), mask.shape[1]
    elif isinstance(pattern, Block):
        tile = pattern.rows * pattern.cols
        zeros, total = zeros // tile, total // tile
    elif isinstance(pattern, Neurons) and pattern.count:
        zeros, total = zeros * pattern.count // max(total, 1), pattern.count
    return sparsity_of(zeros, total) if zeros < total else plan.sparsity


def _remaining_units(pattern: Neurons, old: tuple[int, int], new: tuple[int, int]) -> Neurons:
    """The pattern with the number of units left; unknown when rows and columns went."""
    if old[0] != new[0] and old[1] != new[1]:
        return type(pattern)()
    return type(pattern)(pattern.count * (new[0] * new[1]) // max(old[0] * old[1], 1))


def _shrink_plans(found: Ties, kept: Kept, undo: Undo) -> None:
    plans = found.program.plans
    for name, plan in list(plans.items()):
        weight = found.program.weights[name]
        if not any((found.attributes[weight.attribute], dim) in kept for dim in (0, 1)):
            continue
        result = shrunk_plan(found, weight, plan, kept)
        assert isinstance(result, WeightPlan), result
        undo.append(lambda name=name, plan=plan: plans.__setitem__(name, plan))  # type: ignore[misc]
        plans[name] = result


# --- The traced graph ---------------------------------------------------------------------

Edit = tuple[fx.Node, Any, tuple[Any, ...], Any]  # node, its new target, arguments and value


def _edit(found: Ties, node: fx.Node, kept: Kept) -> Edit | None:
    """What a node must become whose arguments or value spell out sizes that change, or None."""
    name = op_name(node) if node.op == "call_function" else node.op
    own = found.attributes.get(str(node.target), "") if node.op == "get_attr" else node.name
    new = {dim: len(kept[own, dim]) for dim in range(8) if (own, dim) in kept}
    args: list[Any] = list(node.args)
    if name in ("split", "chunk", "split_with_sizes"):
        return _edit_split(found, node, kept)
    if (name in VIEWS or name == "expand") and name != "flatten" and new:
        sizes: list[Any] = list(args[1])
        for dim, size in new.items():
            if isinstance(sizes[dim], int) and sizes[dim] != -1:
                sizes[dim] = size
        args[1] = sizes
    elif name == "slice":
        bounds = slice_bounds(found, node)
        if bounds is not None and (cut := found.key(args[0], bounds[0])) in kept:
            args = [args[0], bounds[0], *(int((kept[cut] < edge).sum()) for edge in bounds[1:])]
    elif name in CONVOLUTIONS and found.products[node.name].columns is None and new:
        read = found.products[node.name].read
        args[8 if name == "convolution" else 6] = len(kept[read])
    value = node.meta.get("val")
    if new and isinstance(value, Tensor):
        value = _resized(value, new)
    if tuple(args) == tuple(node.args) and value is node.meta.get("val"):
        return None
    return node, node.target, tuple(args), value


def _edit_split(found: Ties, node: fx.Node, kept: Kept) -> Edit | None:
    """Parts of any size: what was cut evenly is cut by a list."""
    source: Any = node.args[0]
    keys = {dim: found.key(source, dim) for dim in range(len(found.shape(source)))}
    new = {dim: len(kept[key]) for dim, key in keys.items() if key in kept}
    if not new:
        return None
    along = split_dim(node) % len(keys)
    target, args = node.target, node.args
    sizes = [value.shape[along] for value in node.meta["val"]]
    if along in new:
        stay, edges = kept[keys[along]], [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        below = [int((stay < edge).sum()) for edge in edges]
        sizes = [b - a for a, b in zip(below, below[1:], strict=False)]
        target, args = torch.ops.aten.split_with_sizes.default, (source, sizes, along)
    values = zip(node.meta["val"], sizes, strict=True)
    return node, target, args, [_resized(v, {**new, along: size}) for v, size in values]


def _resized(value: Tensor, sizes: Mapping[int, int]) -> Tensor:
    return value.new_empty([sizes.get(dim, size) for dim, size in enumerate(value.shape)])


def _apply(edit: Edit, undo: Undo) -> None:
    node, target, args, value = edit
    old_target, old_args, old_value = node.target, node.args, node.meta.get("val")

    def put(target: Any, args: Any, value: Any) -> None:
        node.target, node.args = target, args
        if value is not None:
            node.meta["val"] = value

    undo.append(lambda: put(old_target, old_args, old_value))
    put(target, args, value)


def _shrink_signature(found: Ties, kept: Kept, undo: Undo) -> None:
    from torch.utils import _pytree as pytree

    signature = found.program.signature
    leaves, spec = pytree.tree_flatten(signature.args)
    args = pytree.tree_unflatten(select_inputs(found.program, leaves, kept), spec)
    set_attribute(signature, "args", args, undo)


def select_inputs(program: Program, leaves: list[Any], kept: Kept) -> list[Any]:
    """Flat inputs without the entries that went."""
    holders = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    return [select(leaf, node.name, kept) for node, leaf in zip(holders, leaves, strict=True)]


def select(value: Any, name: str, kept: Kept) -> Any:
    """The value of a node without the entries that went."""
    for dim in range(value.dim() if isinstance(value, Tensor) else 0):
        if (name, dim) in kept:
            value = value.index_select(dim, torch.from_numpy(kept[name, dim]))
    return value
