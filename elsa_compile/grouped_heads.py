"""Attention with fewer key and value heads than query heads, without copies of keys and values.

transformers repeats each key and value head for its group of query heads: Unsqueeze, Expand,
Reshape, a copy of the whole cache for every token. ONNX's Attention does the grouping itself. Query
head h meets key head h // (query heads / key heads) either way, so results are the same to the bit.
"""

from typing import Any

import onnx_ir as ir

_KEY, _VALUE = 1, 2


def group_heads(model: ir.Model) -> int:
    """Let Attention nodes read keys and values as they are before they are repeated.

    Args:
        model: changed; the nodes that repeat are left to those who remove unread ones.

    Returns:
        The number of nodes that were changed.
    """
    changed = 0
    for node in model.graph:
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        sources = [_unrepeated(node.inputs[slot]) for slot in (_KEY, _VALUE)]
        # Both or neither: their heads must be equally many.
        if any(source is None for source in sources) or _head_attributes(node):
            continue
        for slot, source in zip((_KEY, _VALUE), sources, strict=True):
            node.replace_input_with(slot, source)
        changed += 1
    if changed:
        _remove_unread(model)
    return changed


def _head_attributes(node: ir.Node) -> bool:
    """Numbers of heads are for inputs of three dimensions."""
    return "q_num_heads" in node.attributes or "kv_num_heads" in node.attributes


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """(B, H, T, D) before each head of it was repeated to (B, H * times, T, D); else None."""
    reshape = _maker(value, "Reshape")
    expand = _maker(reshape and reshape.inputs[0], "Expand")
    unsqueeze = _maker(expand and expand.inputs[0], "Unsqueeze")
    if reshape is None or expand is None or unsqueeze is None or value is None:
        return None
    source, along = unsqueeze.inputs
    wide, repeated = expand.outputs[0].shape, value.shape
    axes = None if along is None else ir.convenience.get_const_tensor(along)
    if source is None or source.shape is None or wide is None or repeated is None:
        return None
    shapes = len(source.shape), len(wide), len(repeated)
    if axes is None or axes.numpy().reshape(-1).tolist() != [2] or shapes != (4, 5, 4):
        return None
    heads, times, all_heads = source.shape[1], wide[2], repeated[1]
    if not all(isinstance(number, int) for number in (heads, times, all_heads)):
        return None
    same = wide[1] == heads and wide[4] == source.shape[3] == repeated[3]
    return source if same and heads * times == all_heads else None


def _maker(value: Any, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _remove_unread(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
