"""Attention with the cache and the heads as the operator means them: fewer nodes and copies.

torch joins the cache and turns heads by nodes of their own. The operator Attention (opset 23) does
that itself:

    Concat(past, new) -> Attention                                        keys and values
    MatMul -> Reshape -> Transpose -> RotaryEmbedding -> Attention -> Transpose -> Reshape

become `MatMul -> RotaryEmbedding -> Attention`, with the cache as inputs and outputs of Attention.
Heads that are normalised by themselves stay for that, and become one row by a Reshape, which copies
nothing. Each step is taken only where sizes known from the graph say that it means the same. Heads
that are repeated are `grouped_heads`' affair, before this.
"""

from dataclasses import dataclass

import onnx_ir as ir

from elsa_compile.needless_nodes import constant, integers, made_by, remove_unused, sizes

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
        remove_unused(model.graph)
    return len(changed)


def _join_cache(node: ir.Node) -> bool:
    """Past keys and values become inputs of Attention, the joined ones outputs."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    joins = [made_by(value, "Concat") for value in node.inputs[1:3]]
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


@dataclass(frozen=True)
class Branch:
    """Where queries, keys or values come from, and what happens to them as heads.

    Attributes:
        source: (batch, length, heads * size), or heads (batch, length, heads, size).
        heads: how many.
        size: of a head.
        norm: a norm of each head, behind the Transpose that goes; it is done before.
        rotary: the RotaryEmbedding, or None.
    """

    source: ir.Value
    heads: int
    size: int
    norm: ir.Node | None
    rotary: ir.Node | None


def _flatten_heads(node: ir.Node) -> bool:
    """Queries, keys, values and results stay (batch, length, heads * size)."""
    branches = [found for value in node.inputs[:3] if (found := _branch(value)) is not None]
    turned = _only_user(node.outputs[0], "Transpose")
    result = _only_user(turned.outputs[0], "Reshape") if turned else None
    if turned is None or result is None or len(branches) != 3 or _turn(turned) != _TURN:
        return False
    heads, groups, width = branches[0].heads, branches[1].heads, branches[2].size
    final = result.outputs[0]
    if not sizes(final) or sizes(final)[-1] != heads * width or final.is_graph_output():
        return False
    rows = integers(result.inputs[1])  # an entry 0 would mean another size of the flat result
    if len(sizes(final)) != 3 and (rows is None or 0 in rows):
        return False
    for index, branch in enumerate(branches):
        _flatten(node, index, branch)
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", groups)
    before = sizes(turned.outputs[0])
    node.outputs[0].shape = ir.Shape([*before[:2], heads * width])
    if len(sizes(final)) == 3:
        ir.convenience.replace_all_uses_with(final, node.outputs[0])
    else:
        result.replace_input_with(0, node.outputs[0])
    return True


def _branch(value: ir.Value | None) -> Branch | None:
    """What stands before one input of Attention, where its heads need not be turned for it."""
    rotary = _made_by_alone(value, "RotaryEmbedding")
    if rotary is not None:
        value = rotary.inputs[0]
    norm = _made_by_alone(value, "RMSNormalization")
    if norm is not None and norm.attributes.get_int("axis", -1) in (-1, 3):
        value = norm.inputs[0]
    else:
        norm = None
    turn = made_by(value, "Transpose")
    if turn is None or turn.inputs[0] is None or _turn(turn) != _TURN:
        return None
    known = sizes(turn.inputs[0])
    if len(known) != 4 or not isinstance(known[2], int) or not isinstance(known[3], int):
        return None
    source, heads, size = turn.inputs[0], known[2], known[3]
    reshape = made_by(source, "Reshape") if norm is None else None
    flat = None if reshape is None else reshape.inputs[0]
    if flat is not None and len(sizes(flat)) == 3 and sizes(flat)[2] == heads * size:
        source = flat
    return Branch(source, heads, size, norm, rotary)


def _flatten(node: ir.Node, index: int, branch: Branch) -> None:
    """Give Attention, or the RotaryEmbedding before it, what the heads were made of."""
    graph, source = node.graph, branch.source
    assert isinstance(graph, ir.Graph)
    if branch.norm is not None:
        branch.norm.replace_input_with(0, source)
        branch.norm.outputs[0].shape = source.shape
        source = branch.norm.outputs[0]
    if len(sizes(source)) == 4:
        width = branch.heads * branch.size
        whole = ir.node("Reshape", [source, constant(graph, [0, 0, width])])
        whole.outputs[0].shape = ir.Shape([*sizes(source)[:2], width])
        whole.outputs[0].type = source.type
        graph.insert_before(branch.rotary or node, whole)
        source = whole.outputs[0]
    if branch.rotary is None:
        node.replace_input_with(index, source)
        return
    branch.rotary.replace_input_with(0, source)
    branch.rotary.attributes["num_heads"] = ir.AttrInt64("num_heads", branch.heads)
    branch.rotary.outputs[0].shape = source.shape


def _made_by_alone(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value for one reader."""
    node = made_by(value, op_type)
    if node is None or node.outputs[0].is_graph_output():
        return None
    return node if len(node.outputs[0].uses()) == 1 else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0] if alone and users[0].op_type == op_type else None


def _turn(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()
