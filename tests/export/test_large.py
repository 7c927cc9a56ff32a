"""A model of 3.2 GB: more than a protobuf message can hold. Takes 5.5 GiB of memory, 3 of disk."""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from elsa_compile.write_onnx import write_onnx

SIZE = 16384  # a weight has 2^28 elements, 1 GiB
DENSITIES = {"dense": 1.0, "half": 0.4, "quarter": 0.25}
ROWS = [0, 1, 8191, SIZE - 2, SIZE - 1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads memory figures from /proc"),
]


def large_model() -> ir.Model:
    """Three products beside each other, weights behind Transposes as torch exports them."""
    nodes = []
    for name in DENSITIES:
        nodes.append(helper.make_node("Transpose", [name], [f"{name}.t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.t"], [f"y.{name}"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", SIZE])],
        [helper.make_tensor_value_info(f"y.{name}", 1, ["n", SIZE]) for name in DENSITIES],
        [helper.make_tensor(name, 1, [0], []) for name in DENSITIES],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )
    rng = np.random.default_rng(0)
    for name, density in DENSITIES.items():
        weight = rng.random((SIZE, SIZE), np.float32)
        weight -= np.float32(1 - density)
        np.maximum(weight, 0, out=weight)
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(weight, name=name)
        value.shape = ir.Shape([SIZE, SIZE])
    return model


def memory_bytes(key: str) -> int:
    """VmRSS: now; VmHWM: the highest since it was last cleared."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if key in x)
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("limit", [2_000_000_000, 100_000_000])
def test_a_model_over_2_gb(limit: int, tmp_path: Path, run_onnx: Any) -> None:
    model = large_model()
    wanted = {}
    for name in DENSITIES:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        wanted[name] = (tensor.numpy()[:, ROWS].T.copy(), tensor.numpy().sum(axis=1))
        del tensor
    path = tmp_path / "large.onnx"
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    result = write_onnx(model, path, in_file_limit_bytes=limit)
    extra = memory_bytes("VmHWM") - before
    del model
    gc.collect()

    print(f"extra {extra / 2**20:.0f} MiB, files {result.model_bytes} + {result.data_bytes}")
    assert extra < 4 * SIZE * SIZE, "no more than one copy of the largest tensor"
    assert result.model_bytes == path.stat().st_size <= limit
    assert result.model_bytes + result.data_bytes > 2**31
    forms = {r.name: (r.form, r.index_encoding) for r in result.records}
    assert all(r.external for r in result.records)
    if limit == 2_000_000_000:
        indices = ("coo", "varint")
        assert forms == {"dense": ("dense", None), "half": indices, "quarter": indices}
    else:
        indices = ("coo", "raw")
        assert result.data_bytes > 2**31
        assert forms == {"dense": ("dense", None), "half": ("dense", None), "quarter": indices}
        check_raw_indices(path, next(r.nonzeros for r in result.records if r.name == "quarter"))

    x = np.zeros((len(ROWS) + 1, SIZE), np.float32)
    x[range(len(ROWS)), ROWS] = 1  # a row of the identity reads a row of the weight exactly
    x[-1] = 1
    for output, (rows, sums) in zip(run_onnx(path, {"x": x}), wanted.values(), strict=True):
        np.testing.assert_array_equal(output[:-1], rows)
        np.testing.assert_allclose(output[-1], sums, rtol=1e-3)


def check_raw_indices(path: Path, nonzeros: int) -> None:
    """The indices in the data file: int64, in range, ascending."""
    (sparse,) = onnx.load(path, load_external_data=False).graph.sparse_initializer
    place = {entry.key: entry.value for entry in sparse.indices.external_data}
    data, offset = path.parent / place["location"], int(place["offset"])
    assert int(place["length"]) == 8 * nonzeros
    indices = np.memmap(data, "<i8", "r", offset, (nonzeros,))
    assert indices[0] >= 0
    assert indices[-1] < SIZE * SIZE
    step = 1 << 24
    for start in range(0, nonzeros, step):
        assert np.all(np.diff(indices[start : start + step + 1]) > 0)
