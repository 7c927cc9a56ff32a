"""What an ONNX file says about itself: our entries in, the exporter's traces out."""

from collections.abc import Mapping
from typing import Any

from onnx import GraphProto, ModelProto

from elsa_compile.weight_store import subgraphs

# The module path helps a person in a graph viewer. The exporter's other entries hold source lines
# and folders of the machine it ran on, and outweigh the nodes of a small model.
_KEPT = frozenset({"pkg.torch.onnx.name_scopes"})
_TRACES = ("pkg.", "namespace")


def set_metadata(model: ModelProto, entries: Mapping[str, str]) -> None:
    """Write entries of metadata_props, each key once; other keys stay."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key not in entries]
    del model.metadata_props[:]
    for key, value in (*kept, *entries.items()):
        model.metadata_props.add(key=key, value=value)


def strip_traces(model: ModelProto) -> None:
    """Drop what torch.onnx and onnxscript noted while exporting, but for the module paths."""
    _strip(model)
    _strip_graph(model.graph)
    for function in model.functions:
        _strip(function)
        for value in function.value_info:
            _strip(value)
        for node in function.node:
            _strip(node)
            for inner in subgraphs(node):
                _strip_graph(inner)


def _strip_graph(graph: GraphProto) -> None:
    _strip(graph)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _strip(value)
    for node in graph.node:
        _strip(node)
        for inner in subgraphs(node):
            _strip_graph(inner)


def _strip(proto: Any) -> None:
    """proto: any message with metadata_props."""
    entries = proto.metadata_props
    kept = [e for e in entries if e.key in _KEPT or not e.key.startswith(_TRACES)]
    if len(kept) < len(entries):
        del entries[:]
        entries.extend(kept)
