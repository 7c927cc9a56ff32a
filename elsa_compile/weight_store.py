"""The exported model in two parts: a graph without weights, and the weights as numpy arrays.

A protobuf message ends at 2 GiB and costs a copy of every weight it holds. So between torch.onnx
and the file the graph is a small ModelProto whose weights lie beside it, most of them views of
the torch parameters: layouts, casts and sparse forms are decided here and applied block by block
while the file is written. Peak memory is one copy of the weights, however large the model.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from elsa_compile.errors import UnsupportedModelError

Array = NDArray[np.generic]

BLOCK_ELEMENTS = 1 << 21  # looked at together: 8 MiB of fp32, 16 MiB of int64 indices

# Whole-byte types, moved out of the message. The rest (int4, strings, complex) stays inside it.
_STORED_TYPES: dict[int, np.dtype[np.generic]] = {
    int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(t))): np.dtype(t)
    for t in (
        *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
        *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        np.bool_,
    )
}


@dataclass(frozen=True)
class StoredWeight:
    """One initializer: array, any shape and strides; dtype, the type it has in the file.

    packed: of int4, which numpy has not, the dimensions in the graph; array is then (bytes,) uint8,
    two elements a byte, the low half first. None for all other types.
    """

    array: Array
    dtype: np.dtype[np.generic]
    packed: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions in the graph."""
        return self.array.shape if self.packed is None else self.packed

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense data in the file."""
        return self.array.size * (1 if self.packed is not None else self.dtype.itemsize)

    def blocks(self) -> Iterator[Array]:
        """The elements in row-major order: 1-D contiguous arrays, as they stand in the file."""
        if self.packed is not None:
            yield from _row_major(self.array)
            return
        for part in _row_major(self.array):
            converted = part.astype(self.dtype, copy=False)
            # The file format is little-endian whatever the machine.
            yield converted.astype(converted.dtype.newbyteorder("<"), copy=False)


def _row_major(array: Array) -> Iterator[Array]:
    """1-D contiguous pieces of at most BLOCK_ELEMENTS, copying a piece only if it must."""
    if array.size <= BLOCK_ELEMENTS:
        yield np.ascontiguousarray(array).reshape(-1)
        return
    row = array[0].size
    if row > BLOCK_ELEMENTS:
        for part in array:
            yield from _row_major(part)
        return
    step = BLOCK_ELEMENTS // row
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step]).reshape(-1)


@dataclass(frozen=True)
class StorageRecord:
    """How one initializer is stored, and what the other forms would take.

    The byte counts of dense and COO are exact: the whole protobuf field, name and dimensions
    included. bitmap_bytes is one bit an element and the packed nonzeros. stored_bytes is the
    chosen form wherever its data lie (in the model file or beside it, without alignment).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nonzeros: int
    form: str  # "dense" | "coo"
    index_encoding: str | None  # "varint" | "raw"; None when dense
    stored_bytes: int
    dense_bytes: int
    coo_varint_bytes: int
    coo_raw_bytes: int
    bitmap_bytes: int
    varint_bytes: int  # of the indices alone
    reason: str
    external: bool = False  # the data lie in the file beside the model
    float_bytes: int | None = None  # dense, if it were not quantised; 0 for scales, None otherwise

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in [0, 1]; an empty tensor has none."""
        size = math.prod(self.shape)
        return 1 - self.nonzeros / size if size else 0.0


@dataclass
class WeightStore:
    """model: everything but the weights; weights: name -> array, in the order of the file.

    `storage` is filled by sparse_encoding.encode; a weight without a record is written dense.
    `float_bytes` is filled by quantised_weights.quantise.
    """

    model: ModelProto
    weights: dict[str, StoredWeight]
    storage: dict[str, StorageRecord] = field(default_factory=dict)
    float_bytes: dict[str, int] = field(default_factory=dict)  # see StorageRecord

    @classmethod
    def from_ir(cls, model: ir.Model) -> "WeightStore":
        """Take a model from torch.onnx (`ONNXProgram.model`); its tensors are viewed, not copied.

        The arrays share memory with the torch parameters: change neither until it is saved.
        """
        weights: dict[str, StoredWeight] = {}
        originals = {}
        initializers = model.graph.initializers
        for name, value in initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise UnsupportedModelError(
                    f"export: initializer {name} of the exported graph has no data; "
                    "export the model with its weights loaded, not on the meta device"
                )
            if tensor.dtype.value in _STORED_TYPES:
                weights[name] = _stored(tensor.numpy(), tensor.dtype.value)
                originals[name] = tensor
        try:
            # A reference to a file is all that gets serialised for such a tensor.
            for name, tensor in originals.items():
                initializers[name].const_value = ir.ExternalTensor(
                    "", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
                )
            proto = ir.serde.serialize_model(model)
        finally:
            for name, tensor in originals.items():
                initializers[name].const_value = tensor
        _remove_initializers(proto.graph, weights)
        return cls(proto, weights)

    @classmethod
    def from_proto(cls, model: ModelProto, base_dir: str = "") -> "WeightStore":
        """Take over a ModelProto: its initializers move out of it. base_dir: of external data."""
        weights = {
            tensor.name: _stored(onnx.numpy_helper.to_array(tensor, base_dir), tensor.data_type)
            for tensor in model.graph.initializer
            if tensor.data_type in _STORED_TYPES
        }
        _remove_initializers(model.graph, weights)
        return cls(model, weights)

    @property
    def graph(self) -> GraphProto:
        """The main graph, without the weights."""
        return self.model.graph


def _stored(array: Array, data_type: int) -> StoredWeight:
    dtype = _STORED_TYPES[data_type]
    # Before bfloat16 had a numpy type, its bits travelled as uint16: read them as what they are.
    return StoredWeight(array if array.dtype == dtype else array.view(dtype), dtype)


def _remove_initializers(graph: GraphProto, names: Collection[str]) -> None:
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@dataclass(frozen=True)
class Use:
    """One place that reads a value.

    node, slot: the node and the number of its input; slot is -1 where a graph nested in the node
    hands the value on as its `output`. nested: the reader lies in a graph inside a node.
    """

    node: NodeProto
    slot: int
    nested: bool = False
    output: ValueInfoProto | None = None

    def redirect(self, name: str) -> None:
        """Read another value instead."""
        if self.output is not None:
            self.output.name = name
        else:
            self.node.input[self.slot] = name


def find_uses(graph: GraphProto) -> dict[str, list[Use]]:
    """Every node input of the graph and of the graphs nested in it, by the name of the value."""
    uses: dict[str, list[Use]] = {}

    def visit(current: GraphProto, nested: bool) -> None:
        for node in current.node:
            for slot, name in enumerate(node.input):
                if name:
                    uses.setdefault(name, []).append(Use(node, slot, nested))
            for inner in subgraphs(node):
                visit(inner, True)
                for output in inner.output:  # a captured value handed on as it is
                    uses.setdefault(output.name, []).append(Use(node, -1, True, output))

    visit(graph, False)
    return uses


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of If, Loop, Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def rename_reads(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Let every reader of a value (key) read another one, in nested graphs too.

    The outputs of the main graph are promises and stay; those of a nested graph are reads.
    """
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name in names:
                node.input[slot] = names[name]
        for inner in subgraphs(node):
            for output in inner.output:
                output.name = names.get(output.name, output.name)
            rename_reads(inner, names)


def pinned(graph: GraphProto, name: str) -> bool:
    """An input can be overridden, an output is promised: neither may change."""
    return any(v.name == name for v in (*graph.input, *graph.output))


def forget_values(graph: GraphProto, names: Collection[str]) -> None:
    """Drop the recorded shapes of values that changed or are gone."""
    kept = [v for v in graph.value_info if v.name not in names]
    if len(kept) == len(graph.value_info):
        return
    del graph.value_info[:]
    graph.value_info.extend(kept)


def value_names(graph: GraphProto) -> set[str]:
    """Every name that is taken in the graph and the graphs nested in it, weights excepted."""
    names = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        names.update((*node.input, *node.output))
        for inner in subgraphs(node):
            names |= value_names(inner)
    return names


def fresh_name(taken: set[str], wanted: str) -> str:
    """`wanted`, or with a number behind it when that is taken; it is taken afterwards."""
    name = wanted
    count = 0
    while name in taken:
        count += 1
        name = f"{wanted}.{count}"
    taken.add(name)
    return name


def tensor_type(dtype: np.dtype[np.generic]) -> int:
    """TensorProto.DataType of a numpy dtype."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def tensor_header(name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> TensorProto:
    """A TensorProto without data."""
    return TensorProto(name=name, dims=shape, data_type=tensor_type(dtype))
