"""An optional input of language models: of how many last positions logits are wanted.

Text generation reads the logits of the last position alone; those of all positions of a prompt of
128 tokens are a fifth to a quarter of its time (SmolLM2-135M, docs/running.md). So the head gets

    logits_to_keep (int64 scalar) -> Neg -> Slice(hidden states, from there) -> head

with the name and the meaning it has in transformers: 0, its default, is all positions, k the last
k. It is an initializer that is listed as an input (ONNX IR version 4): who does not know it feeds
nothing and gets all positions.
"""

import onnx_ir as ir

from elsa_compile.needless_nodes import constant, made_by, sizes
from elsa_compile.runtime.decoder import LOGITS_TO_KEEP

KEPT = "kept"  # name of the size of the logits' second axis
_FIRST_IR_VERSION = 4  # older ones want every initializer to be an input
_END = (1 << 63) - 1
# Each position by itself, with a constant that is the same for all of them.
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity"})


def let_logits_be_chosen(model: ir.Model) -> str | None:
    """Add the input `logits_to_keep` to a language model, in place.

    Args:
        model: with an output "logits" (batch, sequence, vocabulary).

    Returns:
        None, or why the model was left as it is.
    """
    graph = model.graph
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None or len(sizes(logits)) != 3:
        return "there is no output logits (batch, sequence, vocabulary)"
    if model.ir_version < _FIRST_IR_VERSION or any(v.name == LOGITS_TO_KEEP for v in graph.inputs):
        return f"IR version {model.ir_version}, or an input {LOGITS_TO_KEEP} that is there already"
    path = _path_from_head(logits)
    if isinstance(path, str):
        return path
    head = path[-1]
    hidden = head.inputs[0]
    assert hidden is not None
    head.replace_input_with(0, _last_positions(graph, head, hidden))
    # Buffers are shared between values whose declared sizes are equal: these differ from now on.
    for node in path:
        value = node.outputs[0]
        if value.shape is not None:
            value.shape = ir.Shape(
                [size if at != 1 else KEPT for at, size in enumerate(value.shape)]
            )
    return None


def _path_from_head(logits: ir.Value) -> list[ir.Node] | str:
    """The nodes from the logits back to the head, or why there is no such path."""
    path: list[ir.Node] = []
    value = logits
    while True:
        node = value.producer()
        if node is None or node.domain:
            return "the logits come from no product with a constant matrix"
        if path and (len(value.uses()) > 1 or value.is_graph_output()):
            return f"{value.name} on the way to the logits is read elsewhere too"
        path.append(node)
        if node.op_type == "MatMul":
            whole = len(sizes(node.inputs[0])) == 3 and _is_constant(node.inputs[1])
            return path if whole else f"{node.name or 'the last product'} has no constant matrix"
        following = _along(node) if node.op_type in _ELEMENTWISE else None
        if following is None:
            return f"the logits come from {node.op_type}, not from the product of a head"
        value = following


def _along(node: ir.Node) -> ir.Value | None:
    """The input (batch, sequence, ...) of a node whose other input is one for all positions."""
    varying = [value for value in node.inputs if value is not None and not _is_constant(value)]
    others = [value for value in node.inputs if value is not None and _is_constant(value)]
    if len(varying) != 1 or len(sizes(node.outputs[0]) or sizes(varying[0])) != 3:
        return None
    for value in others:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or any(size != 1 for size in tuple(tensor.shape)[:-1]):
            return None
    return varying[0]


def _is_constant(value: ir.Value | None) -> bool:
    """An initializer, perhaps turned or cast on its way, that no caller can replace."""
    while value is not None:
        if value.is_initializer():
            return not value.is_graph_input()
        node = made_by(value, "Transpose") or made_by(value, "Cast") or made_by(value, "Identity")
        if node is None:
            return ir.convenience.get_const_tensor(value) is not None
        value = node.inputs[0]
    return False


def _last_positions(graph: ir.Graph, head: ir.Node, hidden: ir.Value) -> ir.Value:
    """The last `logits_to_keep` of (batch, sequence, width), or all of them for 0."""
    default = ir.tensor(0, dtype=ir.DataType.INT64, name=LOGITS_TO_KEEP)
    keep = ir.Value(
        name=LOGITS_TO_KEEP,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([]),
        const_value=default,
    )
    graph.inputs.append(keep)
    graph.register_initializer(keep)
    back = ir.node("Neg", [keep])
    start = ir.node("Unsqueeze", [back.outputs[0], constant(graph, [0])])
    bounds = [start.outputs[0], constant(graph, [_END]), constant(graph, [1])]
    part = ir.node("Slice", [hidden, *bounds])
    part.outputs[0].shape = ir.Shape([sizes(hidden)[0], KEPT, sizes(hidden)[2]])
    part.outputs[0].type = hidden.type
    graph.insert_before(head, [back, start, part])
    return part.outputs[0]
