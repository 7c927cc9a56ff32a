"""No pruned entry is anything but zero in the file, after all passes together.

The file is read with the protobuf messages and numpy alone; nothing of the compiler, and none of
onnx's helpers, takes part in decoding.
"""

import numpy as np
import pytest
import torch
from onnx import onnx_ml_pb2

import elsa_compile
from elsa_compile import frontend
from elsa_compile.channels import find_ties, members, units
from elsa_compile.export import export
from elsa_compile.passes import (
    AllocateUniform,
    DropDeadUnits,
    FoldNormScale,
    MergeParallelLinears,
    PruneMagnitude,
    QuantizeWeights,
    RepairDegenerate,
)

FLOAT, INT8, INT64, FLOAT16, INT4 = 1, 3, 7, 10, 22  # TensorProto.DataType
KINDS = {FLOAT: "<f4", INT8: "i1", INT64: "<i8", FLOAT16: "<f2"}


def numbers(tensor):
    """A dense tensor as an array; int4 as int64."""
    shape, raw = tuple(tensor.dims), tensor.raw_data
    if tensor.data_type == INT4:
        pairs = np.frombuffer(raw, np.uint8)
        flat = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[: int(np.prod(shape))]
        return ((flat.astype(np.int64) + 8) % 16 - 8).reshape(shape)
    kind = KINDS[tensor.data_type]
    if raw:
        return np.frombuffer(raw, kind).reshape(shape)
    return np.array(tensor.float_data or tensor.int64_data or tensor.int32_data, kind).reshape(
        shape
    )


class File:
    """Initializers by name, and the nodes that read each value."""

    def __init__(self, path):
        model = onnx_ml_pb2.ModelProto.FromString(path.read_bytes())
        graph = model.graph
        self.size = path.stat().st_size
        known = [t for t in graph.initializer if t.data_type in (*KINDS, INT4)]
        self.values = {t.name: numbers(t) for t in known}
        for sparse in graph.sparse_initializer:
            indices = np.array(sparse.indices.int64_data)
            assert (np.diff(indices) > 0).all()
            flat = np.zeros(int(np.prod(sparse.dims)), numbers(sparse.values).dtype)
            flat[indices] = numbers(sparse.values)
            self.values[sparse.values.name] = flat.reshape(tuple(sparse.dims))
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def value(self, name):
        """An initializer, perhaps cast, transposed or widened by what ONNX defines."""
        if name in self.values:
            return self.values[name]
        node = self.makers[name]
        settings = {a.name: a.i for a in node.attribute if a.type == 2}  # INT
        source = self.value(node.input[0])
        if node.op_type == "Transpose":
            return source.T
        if node.op_type == "Cast":
            return source.astype(np.float32)
        assert node.op_type == "DequantizeLinear", node.op_type
        scale = self.value(node.input[1])
        axis = settings.get("axis", 1)
        if "block_size" in settings:
            scale = np.repeat(scale, settings["block_size"], axis)
        else:
            scale = np.expand_dims(scale, 1 - axis)
        return source.astype(np.float32) * scale

    def matrices(self):
        """Name of the stored weight -> (N, K) float32, for all that a MatMul multiplies by."""
        found = {}
        for nodes in self.readers.values():
            for node in nodes:
                if node.op_type not in ("MatMul", "Gemm"):
                    continue
                name = source = node.input[1]
                while source not in self.values and source in self.makers:
                    source = self.makers[source].input[0]
                if source in self.values:
                    turned = any(a.name == "transB" and a.i for a in node.attribute)
                    matrix = self.value(name)
                    found[source] = matrix if turned else matrix.T
        return found


def kill_some(program):
    """Zero what reads a quarter of the neurons and one head of each layer."""
    found = find_ties(program)
    for group in units(found):
        if group.pinned is not None or group.count < 2:
            continue
        dead = torch.arange(group.count // 4 if group.kind == "neurons" else 1)
        for member in members(found, group):
            if member.axis == 1:
                weight = program.weights[member.weight]
                matrix = weight.matrix().clone()
                matrix[:, torch.isin(member.labels, dead)] = 0
                weight.write(matrix)


def everything(bits):
    """Every pass that stands between pruning and the file."""
    groups = {"group_size": 8} if bits == "int4" else {}
    half = "float16" if bits == "int4" else "float32"
    return (
        AllocateUniform(sparsity=0.85),
        PruneMagnitude(),
        RepairDegenerate(restore=True),
        FoldNormScale(),
        *((DropDeadUnits(),) if bits == "int4" else ()),  # groups along inputs cannot shrink
        QuantizeWeights(bits=bits, scales=half, **groups),
        DropDeadUnits(),
        MergeParallelLinears(),
    )


@pytest.mark.parametrize(
    ("family", "bits"),
    [("llama", "int8"), ("gpt2", "int4"), ("opt", "int8"), ("phi3", "int4")],
)
def test_no_pruned_entry_wakes_up(family, bits, make_family, tmp_path):
    model = make_family(family)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    program = frontend.from_module(model)
    kill_some(program)
    elsa_compile.apply(program, *everything(bits))
    counts = {record.name: record.stats.counts for record in program.history}
    dropped = sum(r.stats.changed for r in program.history if r.name == "drop-dead-units")
    assert dropped >= 2 * (16 + 1)
    assert counts["fold-norm-scale"]["folded"] > 0 or family in ("gpt2", "opt")
    path = tmp_path / "model.onnx"
    result = export(program, path)
    stored = File(path).matrices()
    parts = {name: (name,) for name in stored} | dict(result.merged)
    assert bool(result.merged) == (family in ("llama", "opt"))
    checked = awake = kept = 0
    for name, matrix in stored.items():
        row = 0
        for part in parts.get(name, (name,)):
            plan = program.plans.get(part)
            rows = matrix[row : row + len(matrix)]
            if plan is not None and plan.mask is not None:
                mask = plan.mask.numpy()
                rows = matrix[row : row + len(mask)]
                assert rows.shape == mask.shape, part
                awake += int(np.count_nonzero(rows[~mask]))
                kept += int(np.count_nonzero(rows[mask]))
                checked += 1
                wanted = program.weights[part].matrix().detach().numpy()
                np.testing.assert_array_equal(rows, wanted)
            row += len(rows)
    planned = list(program.planned())
    assert checked == len(planned) > 7
    assert awake == 0
    entries = sum(plan.mask.numel() for _, plan in planned)
    assert 0.1 * entries < kept < 0.3 * entries
    assert kept == sum(int((w.parameter != 0).sum()) for w, _ in planned)
    if family == "llama":
        wake_one(path, program)


def wake_one(path, program):
    """The count above is not zero by construction: one byte changed in the file is found."""
    model = onnx_ml_pb2.ModelProto.FromString(path.read_bytes())
    name = "model.layers.0.mlp.down_proj.weight"
    pruned = np.flatnonzero(~program.plans[name].mask.numpy().T.reshape(-1))
    tensors = {t.name: t for t in model.graph.initializer}
    for sparse in model.graph.sparse_initializer:
        if sparse.values.name == name:  # the index of a pruned entry in place of another one
            indices = list(sparse.indices.int64_data)
            after = next(i for i in pruned if i > indices[0])
            later = next(n for n, i in enumerate(indices) if i > after)
            sparse.indices.int64_data[later - 1] = int(after)
            break
    else:
        raw = bytearray(tensors[name].raw_data)
        raw[pruned[7]] = 1
        tensors[name].raw_data = bytes(raw)
    path.write_bytes(model.SerializeToString())
    matrix = File(path).matrices()[name]
    assert np.count_nonzero(matrix[~program.plans[name].mask.numpy()]) == 1
