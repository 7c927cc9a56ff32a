"""Which form a weight gets, why, and what onnxruntime reads from it."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from elsa_compile.errors import UnsupportedModelError
from elsa_compile.onnx_save import save
from elsa_compile.sparse_encoding import MIN_SPARSE_BYTES, encode
from elsa_compile.weight_store import StorageRecord, WeightStore, tensor_type


def sparse_array(shape: tuple[int, ...], density: float, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    keep = rng.random(shape) < density
    return (rng.integers(1, 100, shape) * keep).astype(dtype)


def store_of(arrays: dict[str, Any], op: str = "Identity") -> WeightStore:
    """A graph that hands every weight out through one operation: y.<name> = op(name, ...)."""
    nodes = []
    outputs = []
    for name, array in arrays.items():
        inputs = [name] if op == "Identity" else ["one", name]
        nodes.append(helper.make_node(op, inputs, [f"y.{name}"]))
        outputs.append(
            helper.make_tensor_value_info(f"y.{name}", tensor_type(array.dtype), array.shape)
        )
    given = [] if op == "Identity" else [helper.make_tensor_value_info("one", 1, [1])]
    graph = helper.make_graph(nodes, "g", given, outputs)
    for name, array in arrays.items():
        tensor = TensorProto(name=name, dims=array.shape, data_type=tensor_type(array.dtype))
        tensor.raw_data = array.tobytes()
        graph.initializer.append(tensor)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return WeightStore.from_proto(model)


def read_back(path: Path) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # bfloat16 has no numpy type in onnxruntime: take every output as its bytes.
    return [bytes_of(value) for value in session.run_with_ort_values(None, {})]


def bytes_of(value: Any) -> bytes:
    import ctypes

    count = int(np.prod(value.shape()))
    width = 2 if value.element_type() == TensorProto.BFLOAT16 else value.numpy().itemsize
    return ctypes.string_at(value.data_ptr(), count * width) if count else b""


@pytest.mark.parametrize("limit", [2_000_000_000, 40_000, 20_000])
@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_onnxruntime_reads_every_type_and_density(tmp_path: Path, mode: Any, limit: int) -> None:
    types = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8]
    arrays = {
        f"{np.dtype(dtype).name}.{density}": sparse_array((33, 65), density, dtype)
        for dtype in types
        for density in (0.0, 0.01, 0.3, 1.0)
    }
    arrays |= {"cube": sparse_array((3, 25, 40), 0.1), "row": sparse_array((4096,), 0.1)}
    store = store_of(arrays)
    records = encode(store, mode, arrays, limit)
    saved = save(store, tmp_path / "m.onnx")
    assert saved.model_bytes == (tmp_path / "m.onnx").stat().st_size <= limit
    assert (saved.data is not None) == any(r.external for r in records)
    assert read_back(saved.model) == [array.tobytes() for array in arrays.values()]
    for record in records:
        assert record.nonzeros == np.count_nonzero(arrays[record.name])
        if mode == "auto":
            assert record.stored_bytes <= record.dense_bytes, "never grows a file"
        assert (record.form == "coo") == (record.index_encoding is not None)


def test_forms_by_density() -> None:
    """What RUNTIME measurements say of fp32: varints pay from half zeros on, raw from 2/3 on."""
    arrays = {str(d): sparse_array((256, 256), d) for d in (0.9, 0.5, 0.1)}
    records = {r.name: r for r in encode(store_of(arrays), "auto", arrays)}
    assert [records[d].form for d in ("0.9", "0.5", "0.1")] == ["dense", "coo", "coo"]
    assert records["0.9"].reason == "COO would be larger"
    assert records["0.5"].reason == "COO is smaller"
    assert records["0.5"].coo_raw_bytes > records["0.5"].dense_bytes > records["0.5"].stored_bytes
    assert records["0.1"].index_encoding == "varint"
    assert records["0.1"].sparsity == pytest.approx(0.9, abs=0.01)


def test_varint_and_raw_are_both_candidates() -> None:
    """Past 2^56 a varint has 9 bytes and raw wins; such a weight is priced, not built, here."""
    arrays = {"w": sparse_array((64, 64), 0.1)}
    (record,) = encode(store_of(arrays), "auto", arrays)
    nnz = record.nonzeros
    assert record.coo_raw_bytes - record.coo_varint_bytes == pytest.approx(6 * nnz, rel=0.1)
    assert record.varint_bytes <= 2 * nnz


@pytest.mark.parametrize("limit", [2_000_000_000, 3_000])
def test_negative_zero_counts_as_zero_and_nan_does_not(tmp_path: Path, limit: int) -> None:
    array = np.full((40, 40), -0.0, np.float32)
    array[3, 4], array[5, 6] = np.nan, np.float32(1e-45)
    store = store_of({"w": array})
    (record,) = encode(store, "auto", ["w"], limit)
    assert (record.form, record.nonzeros) == ("coo", 2)
    save(store, tmp_path / "m.onnx")
    (data,) = read_back(tmp_path / "m.onnx")
    assert data == (array + 0.0).tobytes()


def test_a_dense_weight_keeps_its_negative_zeros(tmp_path: Path) -> None:
    array = np.ones((40, 40), np.float32)
    array[3, 4] = -0.0
    store = store_of({"w": array})
    (record,) = encode(store, "auto", ["w"])
    assert (record.form, record.nonzeros) == ("dense", 1599)
    save(store, tmp_path / "m.onnx")
    assert read_back(tmp_path / "m.onnx") == [array.tobytes()]


def only(arrays: dict[str, Any], mode: Any, names: Any = ("w",), op: str = "Identity") -> Any:
    (record,) = encode(store_of(arrays, op), mode, names)
    return record


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_what_stays_dense_and_why(mode: Any) -> None:
    zeros = np.zeros((64, 64), np.float32)
    cases: list[tuple[StorageRecord, str]] = [
        (only({"w": zeros}, "never"), "sparse initializers are off"),
        (only({"w": zeros}, mode, ()), "not one of the model's weights"),
        (only({"w": zeros.astype(np.int64)}, mode), "int64 has no sparse form"),
        (only({"w": zeros[0]}, mode), f"smaller than {MIN_SPARSE_BYTES} bytes"),
        (only({"w": np.zeros((), np.float32)}, mode), "a scalar"),
        (only({"w": zeros}, mode, op="Div"), "read by an operation that sees the sign of a zero"),
    ]
    for record, reason in cases:
        assert (record.form, record.reason) == ("dense", reason)
        assert record.stored_bytes == record.dense_bytes


def test_a_graph_output_stays_dense() -> None:
    store = store_of({"w": np.zeros((64, 64), np.float32)})
    store.graph.output.append(helper.make_tensor_value_info("w", 1, [64, 64]))
    (record,) = encode(store, "always", ["w"])
    assert record.reason == "an input or output of the graph, which others rely on"


def test_always_grows_a_file_when_asked_to() -> None:
    record = only({"w": sparse_array((64, 64), 1.0)}, "always")
    assert (record.form, record.index_encoding) == ("coo", "varint")
    assert record.stored_bytes > record.dense_bytes


def test_outside_varints_stay_inside_while_they_fit(tmp_path: Path) -> None:
    """Room for one weight's indices: the larger saving gets it, the other goes raw or dense."""
    arrays = {"small": sparse_array((64, 64), 0.5), "large": sparse_array((256, 256), 0.5)}
    inside = {r.name: r for r in encode(store_of(arrays), "auto", arrays)}
    limit = inside["large"].varint_bytes + 4000
    store = store_of(arrays)
    records = {r.name: r for r in encode(store, "auto", arrays, limit)}
    assert records["large"].index_encoding == "varint"
    assert (records["small"].form, records["small"].external) == ("dense", True)
    assert records["small"].reason == "COO with indices beside the model file would be larger"
    saved = save(store, tmp_path / "m.onnx")
    assert saved.model_bytes <= limit
    assert read_back(saved.model) == [array.tobytes() for array in arrays.values()]


def test_a_frame_beyond_the_limit_is_an_error() -> None:
    arrays = {f"w{i}": sparse_array((20, 20), 0.5) for i in range(50)}
    with pytest.raises(UnsupportedModelError, match="the names and shapes of 50 weights alone"):
        encode(store_of(arrays), "auto", arrays, store_of(arrays).model.ByteSize() + 500)
    with pytest.raises(UnsupportedModelError, match="without its weights, more than the 100 "):
        encode(store_of(arrays), "auto", arrays, 100)


def test_the_file_passes_the_checker(tmp_path: Path) -> None:
    arrays = {"w": sparse_array((64, 64), 0.1), "empty": np.zeros((64, 64), np.float32)}
    store = store_of(arrays)
    encode(store, "auto", arrays)
    save(store, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
