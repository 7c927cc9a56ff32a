"""`elsa-run pack`: any ONNX file -> the same model with its sparse weights packed.

Weight by weight: dense, with its zeros written out, or a sparse initializer; each is packed where
that takes fewer bytes than it takes now. Values keep every bit. Nothing else in the model changes
but that a Transpose of a packed matrix becomes the unpacking of its transpose.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elsa_compile.runtime import bitmask
from elsa_compile.runtime.bitmask import Array
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.model_writer import IN_FILE_LIMIT_BYTES, every_tensor, writing
from elsa_compile.runtime.onnx_file import ModelFile, inspect, load_checked
from elsa_compile.runtime.onnx_tensors import DTYPES, shown
from elsa_compile.runtime.onnx_values import raw_values, sparse_parts
from elsa_compile.runtime.pack_plan import LEAST_BYTES, Plan, frame_bytes, packable, plan_weights
from elsa_compile.runtime.packed_form import from_nibbles, to_nibbles
from elsa_compile.runtime.unpack_function import LEAST_OPSET
from elsa_compile.runtime.unpack_nodes import Unpacking

_BFLOAT16, _INT4 = 16, 22
_REFUSED = "packing would not make it smaller"
# What stands beside a model and belongs to it.
BESIDE = (
    "config.json", "generation_config.json", "genai_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "elsa_report.json",
    "elsa_recipe.yaml", "elsa_plan.yaml",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one weight.

    Attributes:
        name, shape, dtype: of the weight.
        form: "packed", "dense" or "coo", after.
        before_bytes, after_bytes: in the file.
        dense_bytes: with all zeros.
        nonzeros: entries that differ from the fill value, -0.0 among them; None if not counted.
        negative_zeros: how many of them are -0.0, which cost as much as any value.
        why: it was not packed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    before_bytes: int
    after_bytes: int
    dense_bytes: int
    nonzeros: int | None = None
    negative_zeros: int = 0
    why: str = ""


def pack_file(
    source: str | Path,
    output: str | Path,
    *,
    drop_negative_zeros: bool = False,
    external: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the packed form of a model.

    Args:
        source: an .onnx file or its folder, from any tool.
        output: the .onnx file to write; it may be the source.
        drop_negative_zeros: store -0.0, which multiplying by a mask leaves, as +0.0. Else every
            bit is kept, and each -0.0 costs a value.
        external: data beside the model; None when the source holds more than 2 GB.
        progress: called with weights done and their number.

    Returns:
        For JSON: source, output, bytes before and after, weights (`Outcome`), copied.

    Raises:
        UserInputError: a malformed source, no weight that gets smaller, a place that cannot be
            written.
    """
    file = inspect(source)
    target = Path(output)
    if file.opset < LEAST_OPSET:
        raise UserInputError(
            f"{file.path} has operator set {file.opset}, and packed weights need {LEAST_OPSET} or "
            "newer; convert it (onnx.version_converter)"
        )
    before = file.file_bytes + file.external_bytes
    outside = before > IN_FILE_LIMIT_BYTES if external is None else external
    with writing(target, outside) as writer:
        packer = _Packer(file, writer, drop_negative_zeros)
        outcomes = packer.pack(progress or (lambda done, total: None))
        if not any(each.form == "packed" for each in outcomes):
            reasons = {each.why for each in outcomes} or {"it has no weights"}
            raise UserInputError(
                f"{file.path}: no weight gets smaller by packing ({'; '.join(sorted(reasons)[:3])})"
            )
        for tensor in every_tensor(packer.model):
            writer.carry(tensor, file.path.parent)
        model_bytes, data_bytes = writer.finish(packer.model)
    return {
        "source": str(file.path),
        "output": str(target),
        "before_bytes": before,
        "after_bytes": model_bytes + data_bytes,
        "model_bytes": model_bytes,
        "data_bytes": data_bytes,
        "weights": [asdict(each) for each in outcomes],
        "copied": copy_beside(file.path.parent, target.parent),
    }


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, config and report to another folder, as far as it has none."""
    copied = []
    for name in BESIDE:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
    return copied


class _Packer:
    """One model on its way to the packed form."""

    def __init__(self, file: ModelFile, writer: Any, drop_negative_zeros: bool) -> None:
        self.file, self.writer = file, writer
        self.drop = drop_negative_zeros
        self.model = load_checked(file)
        self.graph = self.model.graph
        self.unpacking = Unpacking(self.model)

    def pack(self, progress: Callable[[int, int], None]) -> list[Outcome]:
        """Pack what gets smaller; the model is changed."""
        held: dict[str, Any] = {tensor.name: tensor for tensor in self.graph.initializer}
        held |= {sparse.values.name: sparse for sparse in self.graph.sparse_initializer}
        plans = plan_weights(self.graph, {n: tuple(t.dims) for n, t in held.items()})
        sizes = {weight.name: weight.stored_bytes for weight in self.file.weights}
        outcomes = []
        packed: set[str] = set()
        done = [name for name in held if name in sizes]  # not mask and values of a packed one
        for number, name in enumerate(done):
            outcome = self._one(held[name], plans[name], sizes[name])
            outcomes.append(outcome)
            if outcome.form == "packed":
                packed.add(name)
            progress(number + 1, len(done))
        self._remove(packed)
        self.unpacking.finish()
        return outcomes

    def _one(self, proto: Any, plan: Plan, stored_bytes: int) -> Outcome:
        coo = hasattr(proto, "indices")
        tensor = proto.values if coo else proto
        shape, dtype = tuple(proto.dims), DTYPES[tensor.data_type]
        dense_bytes = (int(np.prod(shape, dtype=np.int64)) * dtype.bits + 7) // 8
        left = Outcome(
            plan.name, shape, dtype.name, "coo" if coo else "dense", stored_bytes, stored_bytes,
            dense_bytes, why=plan.why_not,
        )  # fmt: skip
        why = plan.why_not or packable(tensor.data_type, self.file.opset)
        if not why and dense_bytes < LEAST_BYTES:
            why = f"smaller than {LEAST_BYTES} bytes"
        if not why and left.dense_bytes * 8 // dtype.bits > bitmask.MAX_ENTRIES:
            why = f"more than {bitmask.MAX_ENTRIES} entries"
        if why:
            return _with(left, why=why)
        dense = self._values(proto, coo)
        mask, values = bitmask.encode(
            dense.T if plan.rows_last else dense, self._fill(plan, dense), self.drop
        )
        negative = (
            0
            if dense.dtype.kind in "iu" and tensor.data_type != _BFLOAT16
            else int(
                np.count_nonzero(bitmask.as_bits(values) == 1 << 8 * values.dtype.itemsize - 1)
            )
        )
        counted = _with(left, nonzeros=len(values) - 1, negative_zeros=negative)
        bits = dtype.bits
        if (
            bitmask.packed_nbytes(dense.size, len(values) - 1, bits) + frame_bytes(plan)
            >= stored_bytes
        ):
            return _with(counted, why=_REFUSED)
        size = self._emit(plan, dense.shape, tensor.data_type, mask, values)
        return _with(counted, form="packed", after_bytes=size)

    def _values(self, proto: Any, coo: bool) -> Array:
        """The dense weight with its bits as stored; int4 one a byte."""
        what = f"weight {shown(proto.values.name if coo else proto.name)}"
        folder = self.file.path.parent
        if coo:
            values, indices = sparse_parts(proto, what, folder, widen=False)
            dense = np.zeros(int(np.prod(proto.dims, dtype=np.int64)), dtype=values.dtype)
            dense[indices] = values
            return dense.reshape(tuple(proto.dims))
        held = raw_values(proto, what, folder)
        if proto.data_type == _INT4:
            held = from_nibbles(held, int(np.prod(proto.dims, dtype=np.int64)))
        return held.reshape(tuple(proto.dims))

    def _fill(self, plan: Plan, dense: Array) -> Array | None:
        """The zero point of a quantised weight, where it has one for all; zeros lie there."""
        if dense.dtype.kind not in "iu":
            return None
        held = {tensor.name: tensor for tensor in self.graph.initializer}
        for reader in plan.readers:
            node = reader.node
            if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
                continue
            zero = held.get(node.input[2])
            if zero is not None and zero.data_type != _INT4:
                points = raw_values(zero, f"weight {shown(zero.name)}", self.file.path.parent)
                if points.size and (points == points.flat[0]).all():
                    return np.asarray(points.flat[0]).astype(dense.dtype)
        return None

    def _emit(
        self, plan: Plan, shape: tuple[int, ...], data_type: int, mask: Array, values: Array
    ) -> int:
        """Initializers and nodes of one packed weight; its bytes in the file, nodes included."""
        int4 = data_type == _INT4
        names = [self._fresh(f"{plan.name}.{part}") for part in ("mask", "values")]
        made = []
        stored = (2, mask), (2 if int4 else data_type, to_nibbles(values) if int4 else values)
        for name, (kind, data) in zip(names, stored, strict=True):
            tensor = self.graph.initializer.add(name=name, data_type=kind, dims=[data.size])
            self.writer.place(tensor, data)
            made.append(tensor.ByteSize() + (0 if tensor.raw_data else data.nbytes))
        nodes = self.unpacking.add(plan, (names[0], names[1]), shape, int4)
        return int(sum(made) + sum(node.ByteSize() for node in nodes))

    def _fresh(self, name: str) -> str:
        return self.unpacking.fresh(name)

    def _remove(self, names: set[str]) -> None:
        """Drop the initializers that are packed now."""
        graph = self.graph
        for held in (graph.initializer, graph.sparse_initializer):
            for index in range(len(held) - 1, -1, -1):
                tensor = held[index] if held is graph.initializer else held[index].values
                if tensor.name in names:
                    del held[index]


def _with(outcome: Outcome, **changes: Any) -> Outcome:
    return Outcome(**{**outcome.__dict__, **changes})


def summary(outcomes: list[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """By form after packing: weights, bytes before and after."""
    table: dict[str, dict[str, int]] = {}
    for each in outcomes:
        row = table.setdefault(each["form"], {"weights": 0, "before_bytes": 0, "after_bytes": 0})
        row["weights"] += 1
        for key in ("before_bytes", "after_bytes"):
            row[key] += each[key]
    return table
