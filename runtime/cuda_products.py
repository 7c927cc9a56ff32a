"""Products of packed weights as nodes of their own, which run packed on a GPU.

On the CPU an execution provider claims a weight's node together with its reader. onnxruntime's CUDA
provider cannot be taught that, so the graph is rewritten in memory before it is opened:

    x, [elsa.Unpack*] -> [Cast | DequantizeLinear] -> MatMul | Gemm
    x, mask, values, [scales], [bias] -> elsa.PackedMatMul

The file stays as it is. What cannot be rewritten is left to the bodies of the file's functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elsa_compile.runtime.onnx_constants import attribute
from elsa_compile.runtime.onnx_values import dense_values, raw_values
from elsa_compile.runtime.packed_form import PackedTensor, find_packed
from elsa_compile.runtime.unpack_function import DOMAIN

OPERATOR = "PackedMatMul"
_STANDARD = ("", "ai.onnx")
_FLOAT32 = 1
_VALUES = ("float32", "float16", "bfloat16", "int8")


@dataclass
class Rewritten:
    """What `rewrite` did.

    Attributes:
        products: names of the weights that are multiplied packed.
        left: name of a packed weight and why it is unpacked instead.
    """

    products: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Weight:
    """A packed weight on its way to a product; or why it cannot be."""

    packed: PackedTensor
    scales: str = ""
    why: str = ""


def rewrite(model: Any, folder: Path) -> Rewritten:
    """Put PackedMatMul nodes into a ModelProto that `onnx_file.inspect` has passed.

    Args:
        model: changed in place; its weights may lie in external data.
        folder: of the model file.

    Returns:
        Which weights, and why not the others.

    Raises:
        Malformed: the packed form is damaged.
    """
    return _Rewriter(model, folder).run()


class _Rewriter:
    def __init__(self, model: Any, folder: Path) -> None:
        self.graph, self.folder = model.graph, folder
        self.made = Rewritten()
        self.packed = {each.name: each for each in find_packed(model, folder)}
        inputs = {value.name for value in self.graph.input}
        self.tensors = {t.name: t for t in self.graph.initializer if t.name not in inputs}
        self.makers = {name: node for node in self.graph.node for name in node.output if name}

    def run(self) -> Rewritten:
        if not self.packed:
            return self.made
        why: dict[str, str] = {}
        done: set[str] = set()
        for node in self.graph.node:
            for slot, name in enumerate(node.input):
                weight = self._weight(name)
                if weight is None or self._passes_on(node):
                    continue
                why_not = weight.why or self._why_not(node, slot, weight.packed)
                if why_not:
                    why[weight.packed.name] = why_not
                else:
                    self._replace(node, weight)
                    done.add(weight.packed.name)
        self.made.products = [name for name in self.packed if name in done and name not in why]
        self.made.left = list(why.items())
        self._remove_unread()
        return self.made

    def _passes_on(self, node: Any) -> bool:
        return node.domain in _STANDARD and node.op_type in ("Cast", "DequantizeLinear")

    def _weight(self, name: str) -> _Weight | None:
        """The packed weight behind a value, through one Cast or DequantizeLinear."""
        if name in self.packed:
            weight = _Weight(self.packed[name])
            if weight.packed.dtype == "int8":
                weight.why = "whole numbers without a DequantizeLinear"
            return weight
        node = self.makers.get(name)
        if node is None or not self._passes_on(node) or node.input[0] not in self.packed:
            return None
        weight = _Weight(self.packed[node.input[0]])
        if node.op_type == "Cast":
            halves = weight.packed.dtype in ("float16", "bfloat16")
            if not halves or attribute(node, "to", 0) != _FLOAT32:
                weight.why = "a Cast that may round"
            return weight
        self._read_scales(node, weight)
        return weight

    def _read_scales(self, node: Any, weight: _Weight) -> None:
        """The scales of a DequantizeLinear: one for each output or for all, no zero point."""
        weight.scales = node.input[1]
        scales = self.tensors.get(weight.scales)
        outputs = weight.packed.packed_shape[0]
        zero = node.input[2] if len(node.input) > 2 else ""
        axis = attribute(node, "axis", 1)
        rank = len(weight.packed.packed_shape)
        if weight.packed.dtype != "int8" or scales is None:
            weight.why = "quantised values other than int8 with constant scales"
        elif zero and not self._all_zero(zero):
            weight.why = "a zero point"
        elif list(scales.dims) not in ([], [1]) and (
            list(scales.dims) != [outputs]
            or axis % rank != (1 if weight.packed.variant.transposed else 0)
        ):
            weight.why = "scales that are not one for each output"

    def _all_zero(self, name: str) -> bool:
        tensor = self.tensors.get(name)
        return tensor is not None and not dense_values(tensor, name, self.folder).any()

    def _why_not(self, node: Any, slot: int, packed: PackedTensor) -> str:
        """Why this reader of a weight is no product of ours; empty when it is one."""
        gemm = node.op_type == "Gemm"
        if node.domain not in _STANDARD or not (gemm or node.op_type == "MatMul") or slot != 1:
            return f"read by {node.op_type}"
        if len(packed.packed_shape) != 2 or packed.dtype not in _VALUES:
            return f"{packed.dtype} of shape {list(packed.shape)}"
        turned = gemm and bool(attribute(node, "transB", 0))
        if turned == packed.variant.transposed:
            return "packed along its outputs"
        ones = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if gemm and (attribute(node, "transA", 0) or not ones):
            return "a Gemm with transA, alpha or beta"
        if raw_values(self.tensors[packed.values], packed.values, self.folder)[0] != 0:
            return "filled with something else than zero"
        return self._why_not_bias(node, packed.packed_shape[0])

    def _why_not_bias(self, node: Any, outputs: int) -> str:
        if len(node.input) < 3 or not node.input[2]:
            return ""
        bias = self.tensors.get(node.input[2])
        fits = bias is not None and list(bias.dims) in ([], [1], [1, 1], [outputs], [1, outputs])
        return "" if fits else "a bias that is not one constant for each output"

    def _replace(self, node: Any, weight: _Weight) -> None:
        from onnx import helper

        packed = weight.packed
        reads = [node.input[0], packed.mask, packed.values, weight.scales]
        reads.append(node.input[2] if len(node.input) > 2 else "")
        while not reads[-1]:
            reads.pop()
        rows, columns = packed.packed_shape
        made = helper.make_node(
            OPERATOR, reads, list(node.output), name=node.name or f"{node.output[0]}.packed",
            domain=DOMAIN, rows=rows, columns=columns,
        )  # fmt: skip
        node.CopyFrom(made)

    def _remove_unread(self) -> None:
        """Nodes on the way that nothing reads any more, and functions that nothing calls."""
        outputs = {value.name for value in self.graph.output}
        held: Mapping[str, Any] = {**self.packed}
        while True:
            read = {name for node in _every_node(self.graph) for name in node.input} | outputs
            dead = [
                index
                for index, node in enumerate(self.graph.node)
                if not read.intersection(node.output)
                and (node.output[0] in held or (self._passes_on(node) and node.input[0] in held))
            ]
            if not dead:
                return
            for index in reversed(dead):
                del self.graph.node[index]


def _every_node(graph: Any) -> list[Any]:
    """Nodes of a graph and of its subgraphs."""
    found = []
    for node in graph.node:
        found.append(node)
        for each in node.attribute:
            for inner in (each.g, *each.graphs):
                found += _every_node(inner)
    return found
