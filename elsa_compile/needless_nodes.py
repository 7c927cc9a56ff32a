"""Nodes of an exported graph that change nothing, or say in many words what one says.

torch.onnx writes each operator by itself: an Expand to the size a value has already, a mask looked
up at every one of its places, the same Cos once more in each layer. A node goes only where sizes
known from the graph say that results stay the same to the bit; equal names of sizes are equal
sizes, so the dimensions must have their names before this.
"""

from collections.abc import Sequence

import onnx_ir as ir

Sizes = tuple[int | str | None, ...]


def drop_needless(model: ir.Model) -> int:
    """Take needless nodes out of a model, in place.

    Returns:
        How many nodes fewer it has.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    before = len(model.graph)
    CommonSubexpressionEliminationPass()(model)
    for node in list(model.graph):
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output() or node.domain:
            continue
        same = _unchanged(node) or _joined_unsqueeze(node) or _whole_matrix(node)
        if same is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], same)
    remove_unused(model.graph)
    return before - len(model.graph)


def remove_unused(graph: ir.Graph) -> None:
    """Remove the nodes whose outputs nobody reads."""
    for node in reversed(list(graph)):
        used = any(value.uses() or value.is_graph_output() for value in node.outputs)
        if not used:
            graph.remove(node, safe=True)


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, where it is of this standard operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def sizes(value: ir.Value | None) -> Sizes:
    """Known sizes as int, others by name, None where even that is unknown; () without a rank."""
    if value is None or value.shape is None:
        return ()
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def integers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(n) for n in tensor.numpy().reshape(-1)]


def constant(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """A vector of int64 as an initializer; equal ones are one."""
    name = "elsa_" + "_".join(str(number).replace("-", "m") for number in numbers)
    if name not in graph.initializers:
        tensor = ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return graph.initializers[name]


def _unchanged(node: ir.Node) -> ir.Value | None:
    """The input that an Expand, a Reshape or an And with True gives back."""
    first = node.inputs[0] if node.inputs else None
    if node.op_type in ("Expand", "Reshape"):
        known = sizes(first)
        whole = bool(known) and None not in known and known == sizes(node.outputs[0])
        return first if whole else None
    if node.op_type == "And":
        for value, other in (node.inputs, reversed(node.inputs)):
            tensor = None if other is None else ir.convenience.get_const_tensor(other)
            fits = (
                tensor is not None and tensor.size == 1 and len(tensor.shape) <= len(sizes(value))
            )
            if fits and tensor is not None and bool(tensor.numpy().all()):
                return value
    return None


def _joined_unsqueeze(node: ir.Node) -> ir.Value | None:
    """One Unsqueeze for two, the first of which may serve others too."""
    inner = made_by(node.inputs[0], "Unsqueeze") if node.op_type == "Unsqueeze" else None
    if inner is None or node.graph is None or not sizes(inner.inputs[0]):
        return None
    axes = [integers(each.inputs[1]) for each in (inner, node)]
    if axes[0] is None or axes[1] is None:
        return None
    new = [False] * len(sizes(inner.inputs[0]))
    for added in axes:
        assert added is not None
        rank = len(new) + len(added)
        places = {axis % rank for axis in added}
        old = iter(new)
        new = [True if place in places else next(old) for place in range(rank)]
    return _unsqueezed(node, inner.inputs[0], [place for place, made in enumerate(new) if made])


def _unsqueezed(node: ir.Node, source: ir.Value | None, axes: Sequence[int]) -> ir.Value:
    """Unsqueeze(source) in the place of a node, with the sizes of its output."""
    graph, old = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    assert source is not None
    made = ir.node("Unsqueeze", [source, constant(graph, axes)])
    graph.insert_before(node, made)
    made.outputs[0].shape, made.outputs[0].type = old.shape, old.type
    return made.outputs[0]


def _whole_matrix(node: ir.Node) -> ir.Value | None:
    """Unsqueeze for a GatherND that reads a whole matrix in order, as masks index batch and length.

    (B, T) at rows 0, 1, ... of shape (B, 1, 1, 1) and columns 0, 1, ... of shape (1, 1, 1, T) is
    (B, 1, 1, T).
    """
    if node.op_type != "GatherND" or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    matrix, wide = sizes(node.inputs[0]), sizes(node.outputs[0])
    joined = made_by(node.inputs[1], "Concat")
    between = (1,) * (len(wide) - 2)
    if joined is None or len(joined.inputs) != 2 or len(matrix) != 2 or None in matrix:
        return None
    last = joined.attributes["axis"].as_int() in (-1, len(wide))
    if not last or len(wide) < 2 or wide != (matrix[0], *between, matrix[1]):
        return None
    wanted = ((matrix[0], *between, 1), (1, *between, matrix[1]))
    if any(_counted(*each) is None for each in zip(joined.inputs, wanted, strict=True)):
        return None
    return _unsqueezed(node, node.inputs[0], range(1, len(wide) - 1))


def _counted(value: ir.Value | None, shape: Sizes) -> ir.Value | None:
    """The Range 0, 1, 2, ... behind Unsqueeze(Expand(value of this shape)), a last axis added."""
    last = made_by(value, "Unsqueeze")
    if last is None or integers(last.inputs[1]) not in ([-1], [len(shape)]):
        return None
    expand = made_by(last.inputs[0], "Expand")
    inner = expand.inputs[0] if expand is not None else None
    if inner is None or sizes(inner) != shape:
        return None
    while (unsqueeze := made_by(inner, "Unsqueeze")) is not None:
        inner = unsqueeze.inputs[0]
    count = made_by(inner, "Range")
    if count is None or integers(count.inputs[0]) != [0] or integers(count.inputs[2]) != [1]:
        return None
    return inner
