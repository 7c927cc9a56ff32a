"""How each weight of a graph is to be packed: which way round, and a node for each reader.

Kernels read a matrix along its inputs, so a weight (K, N) of a MatMul is packed as (N, K) and its
node gives the transpose back. A runtime takes node and reader together, so each of them gets a
node of its own; mask and values are shared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from elsa_compile.runtime.onnx_constants import attribute
from elsa_compile.runtime.packed_form import VALUE_TYPES
from elsa_compile.runtime.unpack_function import LEAST_OPSET_INT4

LEAST_BYTES = 1024  # smaller weights are not worth a node
_STANDARD = ("", "ai.onnx")
_INT4 = 22


@dataclass
class Reader:
    """One reader of a weight.

    Attributes:
        node: NodeProto; None for all the readers in subgraphs together.
        slot: number of its input.
        turned: it wants the transpose of what is packed.
        absorbed: a Transpose whose place the unpacking takes: the node, or the one reader of the
            Cast that the node is.
    """

    node: Any
    slot: int
    turned: bool = False
    absorbed: Any = None


@dataclass
class Plan:
    """What is to become of one weight.

    Attributes:
        name: of the initializer.
        rows_last: pack the transpose of the matrix, since the graph has it as (K, N).
        readers: of the weight.
        why_not: why it cannot be packed; empty when it can.
    """

    name: str
    rows_last: bool = False
    readers: list[Reader] = field(default_factory=list)
    why_not: str = ""


def plan_weights(graph: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Plan]:
    """A plan for each of these initializers of a GraphProto; shapes: name -> shape."""
    plans = {name: Plan(name) for name in shapes}
    readers: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        for slot, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, slot))
    pinned = {value.name for value in (*graph.input, *graph.output)}
    nested = {name for node in graph.node for name in _outer_names(node)}
    for name, plan in plans.items():
        if name in pinned:
            plan.why_not = "an input or output of the graph"
        for node, slot in readers.get(name, []):
            plan.readers.append(_reader(graph, readers, pinned, node, slot, len(shapes[name])))
        if name in nested:
            plan.readers.append(Reader(None, 0))
        if not plan.readers:
            plan.why_not = plan.why_not or "nothing reads it"
        if len(shapes[name]) == 2:
            # A table that is looked up stays as it is; it can be multiplied with as well.
            votes = [reader.turned for reader in plan.readers if reader.absorbed is None]
            plan.rows_last = bool(votes) and all(votes)
            for reader in plan.readers:
                reader.turned = (reader.absorbed is not None) != plan.rows_last
    return plans


def _reader(
    graph: Any,
    readers: dict[str, list[tuple[Any, int]]],
    pinned: set[str],
    node: Any,
    slot: int,
    rank: int,
) -> Reader:
    """`turned` here: the reader multiplies with the weight as (K, N)."""
    made = Reader(node, slot)
    if rank != 2 or slot > 1 or node.domain not in _STANDARD:
        return made
    if _turns(node, pinned):
        made.absorbed = node
        return made
    final, place = node, slot
    if node.op_type in ("DequantizeLinear", "Cast") and slot == 0:
        after = readers.get(node.output[0], [])
        if len(after) != 1:
            return made
        final, place = after[0]
        if node.op_type == "Cast" and node.output[0] not in pinned and _turns(final, pinned):
            made.absorbed = final
            return made
    if final.op_type == "MatMul" and place == 1:
        made.turned = True
    if final.op_type == "Gemm" and place == 1:
        made.turned = attribute(final, "transB", 0) == 0
    return made


def _turns(node: Any, pinned: set[str]) -> bool:
    """Whether a node is the transpose of a matrix, and no output of the graph."""
    return bool(
        node.op_type == "Transpose"
        and node.domain in _STANDARD
        and attribute(node, "perm", [1, 0]) == [1, 0]
        and node.output[0] not in pinned
    )


def _outer_names(node: Any) -> Iterator[str]:
    """Names that the subgraphs of a node read, their own ones included."""
    for found in node.attribute:
        for graph in (found.g, *found.graphs):
            for each in graph.node:
                yield from each.input
                yield from _outer_names(each)
            for value in graph.output:
                yield value.name


def frame_bytes(plan: Plan) -> int:
    """Bytes of the names, shapes and nodes of one packed weight; a little more than they take."""
    return 100 + 3 * len(plan.name) + len(plan.readers) * (60 + 5 * len(plan.name))


def packable(data_type: int, opset: int) -> str:
    """Why values of this TensorProto.DataType cannot be packed; empty when they can."""
    if data_type in VALUE_TYPES:
        return ""
    if data_type == _INT4:
        return "" if opset >= LEAST_OPSET_INT4 else f"int4 needs operator set {LEAST_OPSET_INT4}"
    return "a type that is not packed"
