"""Quantised weights in the exported graph: whole numbers, scales, and what gives the values back.

Everything is standard ONNX but for the lookup in an int4 table. What onnxruntime 1.31 makes of it
on the CPU (measured in November 2026):

    DequantizeLinear -> MatMul, weight (K, N), one scale a channel or groups of 16, 32, 64, ...:
        one MatMulNBits that also rounds the activations to int8 (its accuracy level 4)
    DequantizeLinear -> Transpose -> MatMul of a table that a lookup reads too: the whole table is
        widened at each run; Transpose -> DequantizeLinear -> MatMul: fused, the Transpose is
        folded, if nobody else reads the scales
    DequantizeLinear -> Gemm, Conv, or other groups: the whole weight is widened at each run, exact

    scales in float16 behind a Cast to float32, one for each reader: folded, all of the above holds;
        float16 scales as they are would make DequantizeLinear give float16, and nothing is fused

So a Gemm becomes MatMul and Add, and a Transpose goes before the widening. A lookup table is never
widened: the int8 rows that are read are widened after the Gather; int4 rows are read by
com.microsoft's GatherBlockQuantized, since Gather takes no int4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from elsa_compile.onnx_wire import dense_field, dense_payload, length_of
from elsa_compile.weight_store import (
    Array,
    StoredWeight,
    Use,
    WeightStore,
    find_uses,
    forget_values,
    fresh_name,
    pinned,
    tensor_type,
    value_names,
)

_INT4 = np.dtype(ml_dtypes.int4)
_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight as the compiler sees it.

    Attributes:
        integers: (N, K) int8.
        scale: (N, groups) float32; values are integers times the scale of their group.
        bits: 8 or 4.
        half: the scales are stored as float16, which they are numbers of.
    """

    integers: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int
    half: bool = False

    @property
    def group_size(self) -> int | None:
        """Entries along K that share a scale; None when it is the whole row."""
        groups = self.scale.shape[1]
        return None if groups == 1 else self.integers.shape[1] // groups

    def values(self) -> NDArray[np.float32]:
        """(N, K) float32."""
        rows, columns = self.integers.shape
        grouped = self.integers.reshape(rows, self.scale.shape[1], -1).astype(np.float32)
        return (grouped * self.scale[:, :, None]).reshape(rows, columns)


def quantise(
    store: WeightStore, weights: Mapping[str, QuantisedWeight], float_bytes: int = 4
) -> list[str]:
    """Replace float weights by whole numbers and scales; returns what was left alone, and why.

    Call it after `store_transposed`: layouts are final. Each initializer keeps its name.

    Args:
        store: changed.
        weights: by the name of the initializer, whose values they must equal exactly.
        float_bytes: of an entry if it were not quantised, for the records: 4, else 2.
    """
    notes = []
    for name, weight in weights.items():
        if name not in store.weights:
            continue
        if pinned(store.graph, name):
            notes.append(f"{name}: stays float, it is an input or output of the graph")
            continue
        uses = find_uses(store.graph).get(name, [])
        without_gemm(store, name, uses)
        axis = _output_axis(store.weights[name].array, weight)
        if axis is None:
            notes.append(f"{name}: stays float, the graph holds it in another layout")
            continue
        notes += _replace(store, name, weight, axis, float_bytes)
    return notes


def _output_axis(array: Array, weight: QuantisedWeight) -> int | None:
    """Which axis of the stored array counts the outputs; None when its values lie otherwise."""
    values = weight.values()
    rows, columns = values.shape
    if array.shape == (rows, columns) and np.array_equal(array, values):
        return 0
    if array.shape == (columns, rows) and np.array_equal(array, values.T):
        return 1
    if array.ndim > 2 and array.shape[0] == rows and weight.group_size is None:
        return 0 if np.array_equal(array.reshape(rows, -1), values) else None
    return None


def without_gemm(store: WeightStore, name: str, uses: list[Use]) -> None:
    """Turn the Gemms of a weight into MatMul and Add, its layout into (K, N)."""
    nodes = [use.node for use in uses]
    if not nodes or any(not _plain_gemm(use) for use in uses):
        return
    turned = {_attribute(node, "transB", 0) for node in nodes}
    if len(turned) > 1:
        return
    if turned == {1}:
        old = store.weights[name]
        store.weights[name] = StoredWeight(old.array.transpose(), old.dtype)
    taken = value_names(store.graph) | store.weights.keys()
    for node in nodes:
        bias = node.input[2] if len(node.input) > 2 else ""
        output = node.output[0]
        node.op_type = "MatMul"
        del node.attribute[:]
        del node.input[2:]
        if bias:
            node.output[0] = fresh_name(taken, f"{output}.product")
            add = helper.make_node("Add", [node.output[0], bias], [output], name=f"{output}.add")
            _insert_after(store, node, [add])
    forget_values(store.graph, {name})


def _plain_gemm(use: Use) -> bool:
    node = use.node
    return (
        node.op_type == "Gemm"
        and use.slot == 1
        and not use.nested
        and _attribute(node, "transA", 0) == 0
        and _attribute(node, "alpha", 1.0) == 1.0
        and _attribute(node, "beta", 1.0) == 1.0
    )


def _attribute(node: NodeProto, name: str, default: float) -> float:
    found = [helper.get_attribute_value(a) for a in node.attribute if a.name == name]
    return float(found[0]) if found else default


def _replace(
    store: WeightStore, name: str, weight: QuantisedWeight, axis: int, float_bytes: int
) -> list[str]:
    """Store the whole numbers under the weight's name and rewire its readers."""
    graph = store.graph
    old = store.weights[name]
    lookups: list[Use] = []
    turned: list[Use] = []
    others: list[Use] = []
    for use in find_uses(graph).get(name, []):
        kind = lookups if _is_lookup(use, axis) else turned if _is_turn(use) else others
        kind.append(use)
    if lookups and not _can_look_up(weight):
        others, lookups = lookups + others, []
    taken = value_names(graph) | store.weights.keys()
    scale_name = fresh_name(taken, f"{name}.scale")
    store.weights[name] = _integers(weight, old.array.shape, axis)
    # One dimension where a row has one scale, as DequantizeLinear wants it.
    rows = weight.scale[:, 0] if weight.group_size is None else weight.scale
    store.weights[scale_name] = StoredWeight(
        np.ascontiguousarray(rows.T if axis == 1 else rows),
        np.dtype(np.float16 if weight.half else np.float32),
    )
    size = StoredWeight(old.array, np.dtype(np.float32 if float_bytes == 4 else np.float16))
    store.float_bytes[name] = length_of(dense_field(name, size, dense_payload(size)))
    store.float_bytes[scale_name] = 0
    for use in lookups:
        _look_up(store, use.node, name, scale_name, weight, taken)
    for use in turned:
        scales = _float_scales(store, scale_name, weight, taken)
        _widen_turned(store, use.node, scales, weight, axis, taken)
    if others:
        wide = fresh_name(taken, f"{name}.dequantized")
        for use in others:
            use.redirect(wide)
        scales = _float_scales(store, scale_name, weight, taken)
        graph.node.insert(int(weight.half), _widening(name, scales, wide, weight, axis))
    forget_values(graph, {name})
    return _notes(name, weight, others + turned)


def _float_scales(store: WeightStore, scale: str, weight: QuantisedWeight, taken: set[str]) -> str:
    """The scales as float32, through a Cast of the reader's own where they are stored as float16.

    A DequantizeLinear is fused only if nobody else reads its scales.
    """
    if not weight.half:
        return scale
    wide = fresh_name(taken, f"{scale}.float32")
    cast = helper.make_node(
        "Cast", [scale], [wide], name=f"{wide}.node", to=tensor_type(np.dtype(np.float32))
    )
    store.graph.node.insert(0, cast)
    return wide


def _widening(whole: str, scale: str, wide: str, weight: QuantisedWeight, axis: int) -> NodeProto:
    """The DequantizeLinear from `whole` to `wide`; axis: that of the outputs."""
    node = helper.make_node("DequantizeLinear", [whole, scale], [wide], name=f"{wide}.node")
    attributes = {"axis": axis}
    if weight.group_size is not None:
        attributes = {"axis": 1 - axis, "block_size": weight.group_size}
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    return node


def _widen_turned(
    store: WeightStore,
    node: NodeProto,
    scale: str,
    weight: QuantisedWeight,
    axis: int,
    taken: set[str],
) -> None:
    """Widen after a Transpose, the `node`: whole numbers and scales are turned while loading."""
    output = node.output[0]
    node.output[0] = fresh_name(taken, f"{output}.whole")
    after = []
    if weight.group_size is not None:
        turned = fresh_name(taken, f"{output}.scale")
        after.append(
            helper.make_node("Transpose", [scale], [turned], name=f"{turned}.node", perm=[1, 0])
        )
        scale = turned
    after.append(_widening(node.output[0], scale, output, weight, 1 - axis))
    _insert_after(store, node, after)


def _is_turn(use: Use) -> bool:
    perms = [list(a.ints) for a in use.node.attribute if a.name == "perm"]
    return use.node.op_type == "Transpose" and not use.nested and perms in ([], [[1, 0]])


def _notes(name: str, weight: QuantisedWeight, widened: list[Use]) -> list[str]:
    """What onnxruntime will be slow at."""
    readers = {use.node.op_type for use in widened}
    size = weight.group_size
    fused_group = size is None or (size >= 16 and size & (size - 1) == 0)
    if "Gather" in readers:
        return [f"{name}: the whole table is widened at each run, since onnxruntime looks int4 up "
                "in groups of 16, 32, 64, ... only; set group_size so"]  # fmt: skip
    if readers & {"MatMul", "Transpose"} and not fused_group:
        return [f"{name}: onnxruntime widens it at each run, since it multiplies groups of 16, 32, "
                f"64, ... only, not {size}"]  # fmt: skip
    return []


def _is_lookup(use: Use, axis: int) -> bool:
    return (
        use.node.op_type == "Gather"
        and use.slot == 0
        and axis == 0
        and not use.nested
        and _attribute(use.node, "axis", 0) == 0
    )


def _can_look_up(weight: QuantisedWeight) -> bool:
    """int8 with one scale a row, or int4 in groups that GatherBlockQuantized takes."""
    size = weight.group_size or weight.integers.shape[1]
    if weight.bits == 8:
        return weight.group_size is None
    return size >= 16 and size & (size - 1) == 0


def _look_up(
    store: WeightStore,
    node: NodeProto,
    name: str,
    scale: str,
    weight: QuantisedWeight,
    taken: set[str],
) -> None:
    """Read rows first and widen them after; `node` is the Gather."""
    output, indices = node.output[0], node.input[1]
    scale = _float_scales(store, scale, weight, taken)
    if weight.group_size is None:
        # (N, 1), folded while loading: a DequantizeLinear is fused only if nobody else reads its
        # scales.
        last = "elsa_last_axis"
        if last not in store.weights:
            store.weights[last] = StoredWeight(np.array([-1]), np.dtype(np.int64))
        column = fresh_name(taken, f"{scale}.column")
        place = int(weight.half)  # behind the Cast
        store.graph.node.insert(
            place, helper.make_node("Unsqueeze", [scale, last], [column], name=f"{column}.node")
        )
        scale = column
    if weight.bits == 4:
        node.op_type, node.domain = "GatherBlockQuantized", _CONTRIB
        node.input[:] = [name, indices, scale]
        del node.attribute[:]
        for key, value in (
            ("gather_axis", 0),
            ("quantize_axis", 1),
            ("block_size", weight.group_size or weight.integers.shape[1]),
        ):
            node.attribute.append(helper.make_attribute(key, value))
        _import_contrib(store)
        return
    rows, wide, scales = (
        fresh_name(taken, f"{output}.{part}") for part in ("rows", "wide", "scales")
    )
    node.output[0] = rows
    after = [
        helper.make_node("Cast", [rows], [wide], to=tensor_type(np.dtype(np.float32))),
        helper.make_node("Gather", [scale, indices], [scales], axis=0),
        helper.make_node("Mul", [wide, scales], [output]),
    ]
    for each in after:
        each.name = f"{each.output[0]}.node"
    _insert_after(store, node, after)


def _import_contrib(store: WeightStore) -> None:
    if not any(entry.domain == _CONTRIB for entry in store.model.opset_import):
        store.model.opset_import.add(domain=_CONTRIB, version=1)


def _insert_after(store: WeightStore, node: NodeProto, new: list[NodeProto]) -> None:
    place = next(i for i, each in enumerate(store.graph.node) if each is node)
    for offset, each in enumerate(new, 1):
        store.graph.node.insert(place + offset, each)


def _integers(weight: QuantisedWeight, shape: tuple[int, ...], axis: int) -> StoredWeight:
    """The whole numbers in the layout of the graph; int4 packed, two to a byte, low half first."""
    array = (weight.integers.T if axis == 1 else weight.integers).reshape(shape)
    if weight.bits == 8:
        return StoredWeight(array, np.dtype(np.int8))
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return StoredWeight(flat[0::2] | flat[1::2] << 4, _INT4, packed=shape)
