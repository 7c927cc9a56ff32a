"""Calls of model-local functions: no circles, and bounded when they are put in place."""

from collections.abc import Iterator
from typing import Any

from elsa_compile.runtime.onnx_tensors import Malformed, shown

# Functions are inlined when a model is loaded: ten that call each other ten times make 10^10 nodes.
MAX_INLINED_NODES = 10_000_000


def _nodes(holder: Any) -> Iterator[Any]:
    """Nodes of a graph or function, those of subgraphs included."""
    for node in holder.node:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph)


def check_calls(model: Any) -> None:
    """Functions call no circle, and inlining all of them stays within bounds.

    Raises:
        Malformed: they do, or do not.
    """
    functions: dict[tuple[str, str, str], Any] = {}
    for function in model.functions:
        key = (function.domain, function.name, getattr(function, "overload", ""))
        if key in functions:
            raise Malformed(f"the function {shown(function.name)} is defined twice")
        functions[key] = function
    sizes: dict[tuple[str, str, str], int] = {}
    open_calls: set[tuple[str, str, str]] = set()

    def inlined(holder: Any) -> int:
        total = 0
        for node in _nodes(holder):
            key = (node.domain, node.op_type, getattr(node, "overload", ""))
            total += inlined_call(key) if key in functions else 1
        if total > MAX_INLINED_NODES:
            raise Malformed(f"its functions unfold to over {MAX_INLINED_NODES} nodes")
        return total

    def inlined_call(key: tuple[str, str, str]) -> int:
        if key in open_calls or len(open_calls) > 100:
            raise Malformed(f"the function {shown(key[1])} calls itself, or calls nest 100 deep")
        if key not in sizes:
            open_calls.add(key)
            sizes[key] = inlined(functions[key])
            open_calls.discard(key)
        return sizes[key]

    for key in functions:
        inlined_call(key)
    inlined(model.graph)
