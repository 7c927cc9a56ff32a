"""cos and sin of rotary embeddings, made once for all layers.

The fusion to RotaryEmbedding takes angles of one row for all rows, as a model makes them that
counts positions by itself; the operator wants them for each row of its input. Where the angles come
from the input `position_ids`, they are there for each row already.
"""

import onnx_ir as ir

from elsa_compile.needless_nodes import constant, sizes

Batch = int | str | ir.Value  # a known size, its name, or a value that has it


def widen_tables(model: ir.Model) -> int:
    """Give cos and sin of each RotaryEmbedding the batch of its input, in place.

    Tables that are to be widened to the same batch are widened once, for queries and keys of all
    layers.

    Returns:
        How many tables had to be widened.
    """
    widths: dict[Batch, ir.Value] = {}
    widened: dict[tuple[ir.Value, Batch], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or len(node.inputs) != 3:
            continue
        values, *tables = node.inputs
        for index, table in enumerate(tables, 1):
            if values is None or table is None:
                continue
            batch = _batch(values)
            if batch is not None and _batch(table) == batch:
                continue
            key = batch if batch is not None else values
            if (table, key) not in widened:
                widened[table, key] = _widen(model.graph, node, table, key, widths)
            node.replace_input_with(index, widened[table, key])
    return len(widened)


def _widen(
    graph: ir.Graph, node: ir.Node, table: ir.Value, key: Batch, widths: dict[Batch, ir.Value]
) -> ir.Value:
    """Expand(table, (batch, 1, 1)) before `node`."""
    if key not in widths:
        rows = ir.node("Shape", [node.inputs[0]], attributes={"start": 0, "end": 1})
        whole = [rows.outputs[0], constant(graph, [1, 1])]
        shape = ir.node("Concat", whole, attributes={"axis": 0})
        graph.insert_before(node, [rows, shape])
        widths[key] = shape.outputs[0]
    wide = ir.node("Expand", [table, widths[key]])
    graph.insert_before(node, wide)
    return wide.outputs[0]


def _batch(value: ir.Value) -> int | str | None:
    """First size, for one of Cos and Sin that of their input: fusions note no sizes."""
    known = sizes(value)
    maker = value.producer()
    if not known and maker is not None and maker.op_type in ("Cos", "Sin"):
        known = sizes(maker.inputs[0])
    return known[0] if known else None
