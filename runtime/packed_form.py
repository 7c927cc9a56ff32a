"""Packed weights in an ONNX file: found, and checked as hostile input.

The rules are those of docs/packed-format.md. onnxruntime checks none of them: a mask with more bits
than values reads past the list, or gives another weight without a word.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elsa_compile.runtime import bitmask
from elsa_compile.runtime.bitmask import Array
from elsa_compile.runtime.onnx_tensors import MAX_RANK, Malformed, shown
from elsa_compile.runtime.onnx_values import dense_values, raw_values
from elsa_compile.runtime.unpack_function import (
    DOMAIN,
    LEAST_OPSET,
    LEAST_OPSET_INT4,
    VARIANTS,
    VERSION,
    Variant,
    is_ours,
)

# By TensorProto.DataType: types of values, and bits of one.
VALUE_TYPES = {1: 32, 2: 8, 3: 8, 10: 16, 11: 64, 16: 16}
_NAMES = {1: "float32", 2: "uint8", 3: "int8", 10: "float16", 11: "float64", 16: "bfloat16"}
_INTS = 7  # AttributeProto.INTS


@dataclass(frozen=True)
class PackedTensor:
    """What one node of the packed form unpacks.

    Attributes:
        name: of the weight, the node's output.
        mask, values: names of its initializers.
        packed_shape: of the weight as it was packed.
        variant: of the function.
        dtype: "float32", ..., "int8" or "int4".
        kept: set bits.
        zeros: entries that are zero, -0.0 included.
    """

    name: str
    mask: str
    values: str
    packed_shape: tuple[int, ...]
    variant: Variant
    dtype: str
    kept: int
    zeros: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as the graph reads it."""
        return self.packed_shape[::-1] if self.variant.transposed else self.packed_shape

    @property
    def entries(self) -> int:
        """Number of entries, zeros included."""
        return math.prod(self.packed_shape)

    @property
    def value_bits(self) -> int:
        """Bits of one value."""
        return 4 if self.variant.int4 else VALUE_TYPES[_type_of(self.dtype)]


def _type_of(dtype: str) -> int:
    return next(number for number, name in _NAMES.items() if name == dtype)


def find_packed(model: Any, folder: Path) -> list[PackedTensor]:
    """Every packed weight of a ModelProto whose single tensors were checked; in node order.

    Raises:
        Malformed: a rule of the format is broken; the first that is.
    """
    _check_functions(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for value in model.graph.input:
        tensors.pop(value.name, None)
    counted: dict[tuple[str, str, tuple[int, ...]], tuple[int, int]] = {}
    found = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        what = f"packed weight {shown(node.output[0] if node.output else node.name)}"
        mask, values, shape = _check_node(node, tensors, what)
        variant = VARIANTS[node.op_type]
        key = (mask.name, values.name, shape)
        if key not in counted:
            counted[key] = _check_bytes(mask, values, shape, variant, folder, what)
        dtype = "int4" if variant.int4 else _NAMES[values.data_type]
        found.append(
            PackedTensor(
                node.output[0], mask.name, values.name, shape, variant, dtype, *counted[key]
            )
        )
    return found


def _check_functions(model: Any) -> None:
    """The functions of a file are those of this release, and called from the main graph alone."""
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    there = {each.name for each in model.functions if each.domain == DOMAIN}
    nested = {node.op_type for node in _nested_nodes(model) if node.domain == DOMAIN}
    if nested:
        raise Malformed(
            f"it unpacks weights ({shown(min(nested))}) outside of its main graph, where the "
            "packed form has none"
        )
    if not used | there:
        return
    if versions.get(DOMAIN) != VERSION:
        raise Malformed(
            f"it has packed weights of format version {versions.get(DOMAIN, 'unknown')}, wanted "
            f"{VERSION}"
        )
    unknown = (used | there) - set(VARIANTS)
    if unknown:
        raise Malformed(f"it has the unknown packed form {shown(min(unknown))}")
    if used - there:
        raise Malformed(f"it calls {shown(min(used - there))} but brings no such function")
    opset = versions.get("ai.onnx", 0)
    for each in model.functions:
        if each.domain != DOMAIN:
            continue
        least = LEAST_OPSET_INT4 if VARIANTS[each.name].int4 else LEAST_OPSET
        if opset < least:
            raise Malformed(f"it has {each.name} with operator set {opset}, wanted {least} or more")
        if not is_ours(each, opset):
            raise Malformed(
                f"its function {shown(each.name)} is not that of the packed form: it would compute "
                "something else than a runtime that knows it by name"
            )


def _nested_nodes(model: Any) -> Iterator[Any]:
    """Nodes of subgraphs and functions."""
    holders = [attribute for node in model.graph.node for attribute in node.attribute]
    for function in model.functions:
        yield from function.node
        holders += [attribute for node in function.node for attribute in node.attribute]
    while holders:
        attribute = holders.pop()
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.node
            holders += [each for node in graph.node for each in node.attribute]


def _check_node(
    node: Any, tensors: Mapping[str, Any], what: str
) -> tuple[Any, Any, tuple[int, ...]]:
    """Mask and values (TensorProto) and the packed shape of a node."""
    if len(node.input) != 2 or len(node.output) != 1 or not node.output[0]:
        raise Malformed(
            f"{what} has {len(node.input)} inputs and {len(node.output)} outputs, wanted mask and "
            "values, and the weight"
        )
    mask, values = (tensors.get(name) for name in node.input)
    if mask is None or values is None:
        raise Malformed(f"{what} has a mask or values that are no constants of the file")
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if set(attributes) != {"shape"} or len(node.attribute) != 1:
        raise Malformed(f"{what} has the attributes {sorted(attributes)}, wanted one: shape")
    shape = tuple(attributes["shape"].ints)
    if attributes["shape"].type != _INTS or not 0 < len(shape) <= MAX_RANK or min(shape) < 1:
        raise Malformed(f"{what} has the shape {list(shape)}, wanted 1 to {MAX_RANK} sizes from 1")
    entries = math.prod(shape)
    if entries > bitmask.MAX_ENTRIES:
        raise Malformed(f"{what} has {entries} entries, wanted at most {bitmask.MAX_ENTRIES}")
    variant = VARIANTS[node.op_type]
    if variant.transposed and len(shape) != 2:
        raise Malformed(f"{what} is transposed but has the shape {list(shape)}, wanted a matrix")
    if variant.cut != bool(entries % 8):
        raise Malformed(f"{what} has {entries} entries, for which {node.op_type} is not made")
    return mask, values, shape


def _check_bytes(
    mask: Any, values: Any, shape: tuple[int, ...], variant: Variant, folder: Path, what: str
) -> tuple[int, int]:
    """Set bits and zeros of a weight whose types, lengths and bytes fit each other."""
    if mask.data_type != 2:
        raise Malformed(f"{what} has a mask of another type than uint8")
    if len(values.dims) != 1 or not values.dims[0]:
        raise Malformed(f"{what} has values of shape {list(values.dims)}, wanted one dimension")
    if values.data_type not in VALUE_TYPES or (variant.int4 and values.data_type != 2):
        raise Malformed(f"{what} has values of type {values.data_type}, which are not packed")
    bits = dense_values(mask, f"{what} (mask)", folder)
    held = raw_values(values, f"{what} (values)", folder)
    if not variant.int4:
        kept = bitmask.check(bits, held, len(held), shape, what)
        return kept, _zeros(held, values.data_type, math.prod(shape) - kept)
    count = bitmask.count_bits(bits) + 1
    if len(held) != -(-count // 2):
        raise Malformed(
            f"{what} has {len(held)} bytes of int4 values, wanted {-(-count // 2)}, two to a byte"
        )
    if count % 2 and held[-1] >> 4:
        raise Malformed(f"{what} has a value behind its last one")
    whole = from_nibbles(held, count)
    kept = bitmask.check(bits, whole, count, shape, what)
    return kept, _zeros(whole, 3, math.prod(shape) - kept)


def _zeros(values: Array, data_type: int, filled: int) -> int:
    """Zeros of a weight with so many unset entries."""
    zero = (values & 0x7FFF) == 0 if data_type == 16 else values == 0
    return int(np.count_nonzero(zero[1:])) + (filled if zero[0] else 0)


def to_nibbles(values: Array) -> Array:
    """int4 values, one a byte, as two to a byte, low half first: [1, -1, 2] -> [0xF1, 0x02]."""
    low = values.view(np.uint8) & 0xF
    low = np.append(low, np.uint8(0)) if low.size % 2 else low
    return np.asarray(low[0::2] | low[1::2] << 4)


def from_nibbles(held: Array, count: int) -> Array:
    """The inverse: int8 (count,)."""
    both = np.stack([held & 0xF, held >> 4], axis=-1).reshape(-1)[:count]
    return ((both ^ 8).astype(np.int8) - 8).astype(np.int8)


def unpacked(packed: PackedTensor, tensors: Mapping[str, Any], folder: Path) -> Array:
    """The weight of a checked node, as it was packed; bfloat16 as uint16, int4 as int8."""
    what = f"packed weight {shown(packed.name)}"
    mask = dense_values(tensors[packed.mask], what, folder)
    held = raw_values(tensors[packed.values], what, folder)
    if packed.variant.int4:
        held = from_nibbles(held, packed.kept + 1)
    return bitmask.decode(mask, held, packed.packed_shape)
