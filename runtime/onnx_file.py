"""An ONNX file read from outside as hostile input, before onnxruntime sees it.

`inspect` parses the protobuf, checks every tensor in it (dense and sparse initializers, constants
in attributes, in subgraphs and in functions) and says what the file holds, without loading external
data and without allocating what a shape claims.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.onnx_calls import check_calls
from elsa_compile.runtime.onnx_tensors import (
    DTYPES,
    Malformed,
    Stored,
    check_sparse,
    check_tensor,
    count_zeros,
    shown,
)
from elsa_compile.runtime.packed_form import PackedTensor, find_packed

# protobuf cannot read more; a larger model keeps its weights in external data.
MAX_FILE_BYTES = (1 << 31) - 1
_REPAIR = "the file is damaged or not to be trusted; get it again or compile it again"

Kind = Literal["decoder-with-cache", "language-model", "generic"]
Form = Literal["dense", "coo", "packed"]


@dataclass(frozen=True)
class Value:
    """An input or output. A dimension is a number, a name, or None when nothing is known."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class StoredWeight:
    """One initializer.

    Attributes:
        name: its name in the graph.
        shape: dense shape.
        dtype: "float32", "float16", "int8", ...
        form: "dense", "coo" (a sparse_initializer) or "packed" (docs/packed-format.md).
        stored_bytes: bytes in the file, names, indices and external data included.
        dense_bytes: bytes of all elements, zeros included.
        zeros: number of zero elements; None when not counted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: Form
    stored_bytes: int
    dense_bytes: int
    zeros: int | None

    @property
    def elements(self) -> int:
        """Number of elements, zeros included."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelFile:
    """What a checked ONNX file holds.

    Attributes:
        path: the file.
        kind: "decoder-with-cache", "language-model" (token ids in, logits out) or "generic".
        layers: number of layers with a cache; 0 for models without.
        inputs, outputs: of the main graph; initializers that are listed as inputs are left out.
        optional: names of those: inputs that have a default.
        metadata: key -> value, as the producer wrote it.
        weights: every initializer of the main graph.
        opset: version of the standard operators.
        nodes: operator type -> how often, in the main graph.
        file_bytes: size of the file itself.
        external_bytes: size of the files with external data, each counted once.
        external_paths: those files.
    """

    path: Path
    kind: Kind
    layers: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    metadata: dict[str, str]
    weights: tuple[StoredWeight, ...]
    opset: int
    nodes: dict[str, int]
    file_bytes: int
    external_bytes: int
    external_paths: tuple[Path, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weights once onnxruntime has made them dense."""
        return sum(weight.dense_bytes for weight in self.weights)

    def totals(self) -> dict[str, dict[str, int]]:
        """Per storage form: weights, elements, stored_bytes, dense_bytes (and zeros if counted)."""
        table: dict[str, dict[str, int]] = {}
        for weight in self.weights:
            row = table.setdefault(
                weight.form,
                {"weights": 0, "elements": 0, "stored_bytes": 0, "dense_bytes": 0, "zeros": 0},
            )
            row["weights"] += 1
            row["elements"] += weight.elements
            row["stored_bytes"] += weight.stored_bytes
            row["dense_bytes"] += weight.dense_bytes
            row["zeros"] += weight.zeros or 0
        return table


def locate(path: str | Path) -> Path:
    """The model file that a path means: itself, or model.onnx in a folder.

    Raises:
        UserInputError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.onnx"
    if not path.exists():
        raise UserInputError(f"model {path} does not exist; give an .onnx file")
    if not path.is_file():
        raise UserInputError(f"model {path} is not a regular file; give an .onnx file")
    return path


def inspect(path: str | Path, count_zero: bool = False) -> ModelFile:
    """Check an ONNX file and describe it.

    Args:
        path: the .onnx file, or the folder that holds model.onnx.
        count_zero: also count the zeros of each weight; reads all data once.

    Raises:
        UserInputError: missing, unreadable, or malformed in any way; the sentence names the tensor.
    """
    path = locate(path)
    model = _parse(path)
    try:
        check = _Checker(path.parent, count_zero)
        check.model(model)
        return _describe(path, model, check)
    except Malformed as fault:
        raise UserInputError(f"{path}: {fault}; {_REPAIR}") from None
    except UnicodeDecodeError:
        raise UserInputError(f"{path}: a name in it is not UTF-8 text; {_REPAIR}") from None
    except OSError as error:
        raise UserInputError(f"{path}: its external data cannot be read: {error}") from None


def load_checked(file: ModelFile) -> Any:
    """The ModelProto of a file that `inspect` has passed, its external data left outside."""
    return _parse(file.path)


def _parse(path: Path) -> Any:
    """The ModelProto of a file; nothing in it is checked yet."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserInputError(
            f"{path} has {size} bytes, but an ONNX file ends at 2 GiB; export it with external data"
        )
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserInputError(f"model {path} cannot be read: {error.strerror}") from None
    except (DecodeError, RuntimeError, UnicodeDecodeError):
        raise UserInputError(
            f"{path} is not an ONNX model, or only a part of one: it does not parse; get it again"
        ) from None
    if not model.HasField("graph") or not model.opset_import:
        raise UserInputError(f"{path} is not an ONNX model: it has no graph or no operator set")
    return model


@dataclass
class _Checker:
    """Walks a model and collects its weights and external files on the way."""

    folder: Path
    count_zero: bool
    weights: list[StoredWeight] = field(default_factory=list)
    external: dict[Path, int] = field(default_factory=dict)

    def model(self, model: Any) -> None:
        """Everything in a ModelProto."""
        if model.training_info:
            raise Malformed("it holds training graphs, which an exported model does not have")
        self.graph(model.graph, "", self.weights.append)
        for function in model.functions:
            place = f"function {shown(function.name)}: "
            for attribute in function.attribute_proto:
                self.attribute(attribute, place)
            for node in function.node:
                self.node(node, place)
        check_calls(model)
        self.packed(model)

    def packed(self, model: Any) -> None:
        """Packed weights stand for their two initializers."""
        found = find_packed(model, self.folder)
        parts = {name for each in found for name in (each.mask, each.values)}
        held = {weight.name: weight for weight in self.weights}
        self.weights = [weight for weight in self.weights if weight.name not in parts]
        seen: set[str] = set()
        for each in found:
            # A table that is looked up and multiplied with has two nodes, and its bytes once.
            if each.mask not in seen:
                self.weights.append(_packed_weight(each, held))
                seen.add(each.mask)

    def graph(self, graph: Any, place: str, keep: Callable[[StoredWeight], None]) -> None:
        """Initializers, then the nodes' attributes."""
        names: set[str] = set()
        for tensor in graph.initializer:
            self.unique(tensor.name, names, place)
            keep(self.dense(tensor, f"{place}weight {shown(tensor.name)}"))
        for sparse in graph.sparse_initializer:
            self.unique(sparse.values.name, names, place)
            keep(self.sparse(sparse, f"{place}weight {shown(sparse.values.name)}"))
        for node in graph.node:
            self.node(node, place)

    def unique(self, name: str, names: set[str], place: str) -> None:
        """An initializer needs a name of its own."""
        if not name or name in names:
            raise Malformed(f"{place}two weights, or one without a name, are called {shown(name)}")
        names.add(name)

    def node(self, node: Any, place: str) -> None:
        """The tensors and subgraphs that a node carries."""
        for attribute in node.attribute:
            self.attribute(attribute, f"{place}node {shown(node.name or node.op_type)}: ")

    def attribute(self, attribute: Any, place: str) -> None:
        """Tensors, sparse tensors and graphs, single and in lists; whatever `type` claims."""
        what = f"{place}attribute {shown(attribute.name)}"
        singles = {name for name in ("t", "sparse_tensor", "g") if attribute.HasField(name)}
        for tensor in (*([attribute.t] if "t" in singles else []), *attribute.tensors):
            self.dense(tensor, what)
        held = [attribute.sparse_tensor] if "sparse_tensor" in singles else []
        for sparse in (*held, *attribute.sparse_tensors):
            self.sparse(sparse, what)
        for graph in (*([attribute.g] if "g" in singles else []), *attribute.graphs):
            self.graph(graph, f"{what}: ", _ignore)

    def dense(self, tensor: Any, what: str) -> StoredWeight:
        """A checked TensorProto as a table row."""
        stored = check_tensor(tensor, what, self.folder)
        return StoredWeight(
            tensor.name,
            stored.shape,
            stored.dtype.name,
            "dense",
            tensor.ByteSize() + self.seen(stored),
            stored.nbytes,
            count_zeros(tensor, stored) if self.count_zero else None,
        )

    def sparse(self, sparse: Any, what: str) -> StoredWeight:
        """A checked SparseTensorProto as a table row."""
        values, indices = check_sparse(sparse, what, self.folder)
        elements = math.prod(sparse.dims)
        explicit = count_zeros(sparse.values, values) if self.count_zero else None
        return StoredWeight(
            sparse.values.name,
            tuple(sparse.dims),
            values.dtype.name,
            "coo",
            sparse.ByteSize() + self.seen(values) + self.seen(indices),
            (elements * values.dtype.bits + 7) // 8,
            None if explicit is None else elements - values.shape[0] + explicit,
        )

    def seen(self, stored: Stored) -> int:
        """Bytes of a tensor outside of the model file, whose file is remembered."""
        if stored.external is None:
            return 0
        self.external[stored.external.path] = stored.external.path.stat().st_size
        return stored.external.length


def _packed_weight(packed: PackedTensor, held: Mapping[str, StoredWeight]) -> StoredWeight:
    mask, values = held[packed.mask], held[packed.values]
    return StoredWeight(
        packed.name,
        packed.shape,
        packed.dtype,
        "packed",
        mask.stored_bytes + values.stored_bytes,
        (packed.entries * packed.value_bits + 7) // 8,
        packed.zeros,
    )


def _ignore(_: StoredWeight) -> None:
    """Constants of subgraphs are checked but are no weights."""


def _describe(path: Path, model: Any, check: _Checker) -> ModelFile:
    """The facts of a checked model."""
    weights = {weight.name for weight in check.weights}
    inputs = tuple(_value(v) for v in model.graph.input if v.name not in weights)
    outputs = tuple(_value(v) for v in model.graph.output)
    kind, layers = model_kind([v.name for v in inputs], [v.name for v in outputs])
    nodes: dict[str, int] = {}
    for node in model.graph.node:
        nodes[node.op_type] = nodes.get(node.op_type, 0) + 1
    opsets = {entry.domain or "ai.onnx": int(entry.version) for entry in model.opset_import}
    return ModelFile(
        path=path,
        kind=kind,
        layers=layers,
        inputs=inputs,
        outputs=outputs,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        weights=tuple(check.weights),
        opset=opsets.get("ai.onnx", 0),
        nodes=nodes,
        file_bytes=path.stat().st_size,
        external_bytes=sum(check.external.values()),
        external_paths=tuple(check.external),
        optional=tuple(v.name for v in model.graph.input if v.name in weights),
    )


def _value(value: Any) -> Value:
    """A ValueInfoProto; a negative size, which old exporters wrote for "any", counts as unknown."""
    tensor = value.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    shape = tuple(_dimension(dim) for dim in tensor.shape.dim)
    return Value(value.name, dtype.name if dtype else "unknown", shape)


def _dimension(dim: Any) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return str(dim.dim_param) or None


def model_kind(inputs: list[str], outputs: list[str]) -> tuple[Kind, int]:
    """Kind of a model and its number of cached layers, from its names alone."""
    if "input_ids" not in inputs or "logits" not in outputs:
        return "generic", 0
    layers = {
        int(m[1]) for n in inputs if (m := re.fullmatch(r"past_key_values\.(\d{1,6})\.key", n))
    }
    if layers:
        return "decoder-with-cache", len(layers)
    plain = set(inputs) <= {"input_ids", "attention_mask", "position_ids"}
    return ("language-model" if plain else "generic"), 0
