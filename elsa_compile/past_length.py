"""The length of the past from the masks' sizes instead of the cache's.

A cache may be one piece of memory with room for tokens to come, as our runtime keeps it: its size
then says how much room there is, not how many tokens were seen. attention_mask (batch, past +
sequence) and input_ids (batch, sequence) always say that, so graphs ask them:

    Shape(past_key_values.N.key)[2]  becomes  Shape(attention_mask)[1] - Shape(input_ids)[1]
"""

import onnx_ir as ir

from elsa_compile.needless_nodes import remove_unused, sizes

_IDS, _MASK, _PAST = "input_ids", "attention_mask", "past_key_values."


def measure_past_by_masks(model: ir.Model) -> int:
    """Let no node of a language model read the sizes of its cache, in place.

    Returns:
        How many nodes read them before and do not now; 0 for a model without these inputs.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    ids, mask = inputs.get(_IDS), inputs.get(_MASK)
    if ids is None or mask is None or len(sizes(ids)) != 2 or len(sizes(mask)) != 2:
        return 0
    changed = 0
    for node in list(graph):
        cache = node.inputs[0] if node.op_type == "Shape" and not node.domain else None
        if cache is None or cache not in graph.inputs or not str(cache.name).startswith(_PAST):
            continue
        axis = _only_axis(node)
        if axis == 0:
            made = _size_of(node, ids, 0)
        elif axis == 2:
            less = ir.node("Sub", [_size_of(node, mask, 1), _size_of(node, ids, 1)])
            graph.insert_before(node, less)
            made = less.outputs[0]
            made.shape, made.type = node.outputs[0].shape, node.outputs[0].type
        else:
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], made)
        changed += 1
    if changed:
        CommonSubexpressionEliminationPass()(model)  # sizes of input_ids were asked for already
        remove_unused(graph)
    return changed


def _only_axis(node: ir.Node) -> int | None:
    """The one axis whose size a Shape of a cache (4 axes) gives."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    start, end = (place + 4 if place < 0 else place for place in (start, end))
    return start if end == start + 1 else None


def _size_of(before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    made = ir.node("Shape", [value], {"start": axis, "end": axis + 1})
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, made)
    made.outputs[0].shape, made.outputs[0].type = before.outputs[0].shape, before.outputs[0].type
    return made.outputs[0]
