"""What a graph multiplies with: constants, followed through the nodes that loading folds away.

A weight seldom reaches its product directly: a tied head passes a Transpose, quantised values a
DequantizeLinear, a mask of torch's pruning utilities a Mul. onnxruntime folds these while loading.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.onnx_tensors import DTYPES, Malformed, shown
from elsa_compile.runtime.onnx_values import Array, dense_values, sparse_values
from elsa_compile.runtime.packed_form import PackedTensor, find_packed, unpacked

CONTRIB = "com.microsoft"
_STANDARD = ("", "ai.onnx")
_MOVES = ("Identity", "Transpose", "Cast", "DequantizeLinear", "Mul", "Constant")
_LONGEST = 16  # nodes between a weight and its product; a real one has two
_FLOATS = {1: np.float32, 10: np.float16, 11: np.float64}


@dataclass(frozen=True)
class Constant:
    """An initializer, or the value of a Constant node.

    Attributes:
        name: of the initializer.
        shape, dtype: as stored.
        form: "dense", "coo" or "packed".
        proto: TensorProto, SparseTensorProto or `PackedTensor`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    proto: Any

    @property
    def elements(self) -> int:
        """Number of elements, zeros included."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Route:
    """How a constant reaches a reader.

    Attributes:
        weight: the constant it all comes from; of a DequantizeLinear the whole numbers, of a Mul
            the first.
        steps: operator types between, from the constant on.
        nodes: how many are computed on the way, those of scales and masks included.
    """

    weight: Constant
    steps: tuple[str, ...]
    nodes: int


class Constants:
    """The constants of a main graph, by the names its nodes read."""

    def __init__(self, model: Any, folder: Path) -> None:
        """Of a ModelProto that `onnx_file.inspect` has passed, and its folder.

        Raises:
            Malformed: a name in it that is not UTF-8 text.
        """
        held = [tensor.name for tensor in model.graph.initializer]
        held += [sparse.values.name for sparse in model.graph.sparse_initializer]
        for node in model.graph.node:
            held += [node.name, node.op_type, node.domain, *node.input, *node.output]
        if not all(isinstance(name, str) for name in held):  # protobuf hands them out as bytes
            raise Malformed("a name in it is not UTF-8 text")
        self.folder = folder
        self.graph = model.graph
        self._routes: dict[str, Route | None] = {}
        # An initializer that is an input too is only a default, which a run may change.
        inputs = {value.name for value in self.graph.input}
        self._held: dict[str, Constant] = {}
        for tensor in self.graph.initializer:
            if tensor.name not in inputs:
                self._held[tensor.name] = _dense(tensor.name, tensor)
        for sparse in self.graph.sparse_initializer:
            name = sparse.values.name
            if name not in inputs:
                dtype = DTYPES[sparse.values.data_type].name
                self._held[name] = Constant(name, tuple(sparse.dims), dtype, "coo", sparse)
        self._add_packed(model)
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        for name, node in self.makers.items():
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            if _is(node, "Constant") and tensor is not None and name not in self._held:
                self._held[name] = _dense(name, tensor)

    def _add_packed(self, model: Any) -> None:
        """Packed weights stand for their masks and values; one with two nodes stands once."""
        self._tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self._twins: dict[str, PackedTensor] = {}
        first: dict[str, PackedTensor] = {}
        for packed in find_packed(model, self.folder):
            self._held.pop(packed.mask, None)
            self._held.pop(packed.values, None)
            owner = first.setdefault(packed.mask, packed)
            if owner is packed:
                held = Constant(packed.name, packed.shape, packed.dtype, "packed", packed)
                self._held[packed.name] = held
            else:
                turned = owner.variant.transposed != packed.variant.transposed
                steps = ("Transpose",) if turned else ()
                self._routes[packed.name] = Route(self._held[owner.name], steps, len(steps))
                self._twins[packed.name] = packed

    def _unpacked(self, packed: PackedTensor) -> Array:
        """The values of a packed weight as the graph reads them."""
        dense = unpacked(packed, self._tensors, self.folder)
        if packed.dtype == "bfloat16":
            dense = (dense.astype(np.uint32) << 16).view(np.float32)
        return dense.T if packed.variant.transposed else dense

    def __iter__(self) -> Iterator[Constant]:
        """Every constant, initializers first."""
        return iter(self._held.values())

    def held(self, name: str) -> Constant | None:
        """The constant of exactly this name."""
        return self._held.get(name)

    def route(self, name: str, depth: int = 0) -> Route | None:
        """The way from a constant to a value; None when the value depends on an input."""
        if name in self._held:
            return Route(self._held[name], (), 0)
        if name not in self._routes:
            self._routes[name] = self._followed(name, depth)
        return self._routes[name]

    def _followed(self, name: str, depth: int) -> "Route | None":
        node = self.makers.get(name)
        if node is None or depth > _LONGEST or not any(_is(node, op) for op in _MOVES):
            return None
        found = [self.route(read, depth + 1) for read in node.input if read]
        ways = [each for each in found if each is not None]
        nodes = 1 + sum(each.nodes for each in ways)
        if not ways or len(ways) < len(found) or nodes > _LONGEST:
            return None
        return Route(ways[0].weight, (*ways[0].steps, node.op_type), nodes)

    def values(self, name: str, depth: int = 0) -> Array:
        """The values of a name that has a `route`, computed as onnxruntime would.

        Raises:
            Malformed: types, shapes or attributes this release cannot compute with.
        """
        constant = self._held.get(name)
        if name in self._twins:
            return self._unpacked(self._twins[name])
        if constant is not None and constant.form == "packed":
            return self._unpacked(constant.proto)
        if constant is not None:
            what = f"weight {shown(name)}"
            read = sparse_values if constant.form == "coo" else dense_values
            return read(constant.proto, what, self.folder)
        node = self.makers[name]
        if depth > _LONGEST:
            raise Malformed(f"node {shown(node.name)} hangs on a chain of over {_LONGEST} nodes")
        given = [self.values(read, depth + 1) for read in node.input if read]
        try:
            return _computed(node, given)
        except (ValueError, IndexError, TypeError, KeyError, MemoryError) as error:
            raise Malformed(
                f"node {shown(node.name or node.op_type)} ({node.op_type}) cannot be computed from "
                f"its constants: {error}"
            ) from None


def attribute(node: Any, name: str, default: Any) -> Any:
    """An int, float or list of ints of a node."""
    for found in node.attribute:
        if found.name == name:
            return {1: found.f, 2: found.i, 7: list(found.ints)}.get(found.type, default)
    return default


def _is(node: Any, op: str) -> bool:
    return node.op_type == op and node.domain in _STANDARD


def _dense(name: str, tensor: Any) -> Constant:
    return Constant(name, tuple(tensor.dims), DTYPES[tensor.data_type].name, "dense", tensor)


def _computed(node: Any, given: list[Array]) -> Array:
    """One of `_MOVES` by numpy."""
    first = given[0]
    if node.op_type == "Transpose":
        return np.transpose(first, attribute(node, "perm", None))
    if node.op_type == "Cast":
        kind = attribute(node, "to", 0)
        if kind not in _FLOATS:
            raise ValueError(f"a Cast to type {kind}")
        return first.astype(_FLOATS[kind])
    if node.op_type == "Mul":
        # Broadcasting two small constants can make a huge one.
        if math.prod(np.broadcast_shapes(*(each.shape for each in given))) > max(
            each.size for each in given
        ):
            raise ValueError("a Mul that makes its constants larger")
        with np.errstate(all="ignore"):
            return np.asarray(given[0] * given[1])
    if node.op_type == "DequantizeLinear":
        return dequantised(
            first,
            given[1],
            given[2] if len(given) > 2 else None,
            attribute(node, "axis", 1),
            attribute(node, "block_size", 0),
        )
    return first


def dequantised(
    whole: Array, scale: Array, zero: Array | None, axis: int, block: int
) -> NDArray[np.float32]:
    """(whole - zero) * scale, as DequantizeLinear.

    Args:
        whole: integers of any shape.
        scale: one for all, one for each index of `axis`, or with `block` one for each so many.
        zero: like scale, or None for 0.
        axis: see scale.
        block: 0 for none.

    Example: whole [[1, 2, 3, 4]], scale [[1, 10]], axis 1, block 2 -> [[1, 2, 30, 40]].
    """

    def spread(part: Array) -> Array:
        if part.size == 1 and not block:
            return part.reshape(())
        if block:
            if part.ndim != whole.ndim or part.shape[axis] != -(-whole.shape[axis] // block):
                raise ValueError(f"scales of shape {part.shape} for blocks of {block}")
            if part.shape[axis] == 1:  # whatever huge number the block is
                return part
            long = np.repeat(part, block, axis=axis)
            return long.take(range(whole.shape[axis]), axis=axis)
        shape = [1] * whole.ndim
        shape[axis] = -1
        return part.reshape(shape)

    values = whole.astype(np.float32)
    with np.errstate(all="ignore"):  # a damaged scale may overflow
        if zero is not None:
            values -= spread(zero).astype(np.float32)
        values *= spread(scale).astype(np.float32)
    return values
