"""Attention with the cache and the heads as the operator means them: fewer nodes and copies.

torch joins the cache and turns heads by nodes of their own. The operator Attention (opset 23) does
that itself:

    Concat(past, new) -> Attention                                        keys and values
    MatMul -> Reshape -> Transpose -> RotaryEmbedding -> Attention -> Transpose -> Reshape

become `MatMul -> RotaryEmbedding -> Attention`, with the cache as inputs and outputs of Attention.
Each step is taken only where sizes known from the graph say that it means the same. Heads that are
repeated are `grouped_heads`' affair, before this.
"""

import onnx_ir as ir

_TURN = (0, 2, 1, 3)  # (batch, length, heads, size) to (batch, heads, length, size) and back


def shorten_attention(model: ir.Model) -> int:
    """Rewrite the Attention nodes of a model in place.

    Returns:
        How many were changed.
    """
    nodes = [
        node
        for node in model.graph
        if node.op_type == "Attention" and len(node.inputs) in (3, 4) and len(node.outputs) == 1
    ]
    changed: set[ir.Node] = set()
    for step in (_join_cache, _flatten_heads):
        changed |= {node for node in nodes if step(node)}
        _remove_unused(model.graph)
    return len(changed)


def _join_cache(node: ir.Node) -> bool:
    """Past keys and values become inputs of Attention, the joined ones outputs."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    joins = [_made_by(value, "Concat") for value in node.inputs[1:3]]
    for join in joins:
        if join is None or len(join.inputs) != 2 or join.inputs[0] not in graph.inputs:
            return False
        joined = join.outputs[0]
        alone = {user for user, _ in joined.uses()} == {node}
        axis = join.attributes["axis"].as_int()
        if axis not in (2, -2) or not alone or not joined.is_graph_output():
            return False
    keys, values = (join for join in joins if join is not None)
    past = [keys.inputs[0], values.inputs[0]]
    node.replace_input_with(1, keys.inputs[1])
    node.replace_input_with(2, values.inputs[1])
    node.resize_inputs(6)
    node.resize_outputs(3)
    for index, (join, before) in enumerate(zip((keys, values), past, strict=True)):
        node.replace_input_with(4 + index, before)
        old, new = join.outputs[0], node.outputs[1 + index]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = f"{old.name}.joined"
        graph.outputs[graph.outputs.index(old)] = new
    return True


def _flatten_heads(node: ir.Node) -> bool:
    """Queries, keys, values and results stay (batch, length, heads * size)."""
    flat = [_flat(value) for value in node.inputs[:3]]
    turned = _only_user(node.outputs[0], "Transpose")
    result = _only_user(turned.outputs[0], "Reshape") if turned else None
    if turned is None or result is None or any(each is None for each in flat):
        return False
    # `_flat` found their sizes: (batch, heads, length, size).
    heads, groups, size = (
        int(_sizes(node.inputs[index])[at] or 0) for index, at in ((0, 1), (1, 1), (2, 3))
    )
    final = result.outputs[0]
    if _turn(turned) != _TURN or _sizes(final)[2:] != (heads * size,) or final.is_graph_output():
        return False
    for index, value in enumerate(node.inputs[:3]):
        rotary = _made_by(value, "RotaryEmbedding")
        if rotary is None:
            node.replace_input_with(index, flat[index])
            continue
        rotary.replace_input_with(0, flat[index])
        rotary.attributes["num_heads"] = ir.AttrInt64("num_heads", groups if index else heads)
        rotary.outputs[0].shape = flat[index].shape  # type: ignore[union-attr]
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", groups)
    node.outputs[0].shape = final.shape
    ir.convenience.replace_all_uses_with(final, node.outputs[0])
    return True


def _flat(value: ir.Value | None) -> ir.Value | None:
    """X of Transpose(Reshape(X)), and of that behind a RotaryEmbedding, (batch, length, all)."""
    rotary = _made_by(value, "RotaryEmbedding")
    if rotary is not None and len(value.uses()) == 1:  # type: ignore[union-attr]
        value = rotary.inputs[0]
    turn = _made_by(value, "Transpose")
    reshape = _made_by(turn.inputs[0], "Reshape") if turn else None
    if turn is None or reshape is None or value is None or _turn(turn) != _TURN:
        return None
    flat, sizes, whole = reshape.inputs[0], _sizes(value), _sizes(reshape.inputs[0])
    if len(sizes) != 4 or len(whole) != 3 or len(_sizes(reshape.outputs[0])) != 4:
        return None
    if not isinstance(sizes[1], int) or not isinstance(sizes[3], int):
        return None
    return flat if whole[2] == sizes[1] * sizes[3] else None


def _remove_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        used = any(value.uses() or value.is_graph_output() for value in node.outputs)
        if not used:
            graph.remove(node, safe=True)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0] if alone and users[0].op_type == op_type else None


def _turn(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _sizes(value: ir.Value | None) -> tuple[int | str | None, ...]:
    """Known sizes as int, others by name; () when the rank is unknown."""
    if value is None or value.shape is None:
        return ()
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)
