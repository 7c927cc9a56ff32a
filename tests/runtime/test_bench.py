"""elsa-run bench: stock references, layers, page. Of times only that they are there and sane."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import elsa_compile
from elsa_compile.errors import UserInputError, VerificationError
from elsa_compile.runtime import bench as benchmark
from elsa_compile.runtime import kernels, stock
from elsa_compile.runtime.agreement import agreement
from elsa_compile.runtime.bench_page import picture
from elsa_compile.runtime.cli import main
from elsa_compile.runtime.onnx_file import inspect
from elsa_compile.runtime.prediction import compare_prediction, prediction_of

SHORT = ("--prefill", 8, "--context", 8, "--steps", 2, "--repetitions", 3, "--warmup", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("compiled")
    elsa_compile.compile(llama_folder, folder / "model.onnx", "magnitude", sparsity=0.6)
    return folder / "model.onnx"


def run(capsys, *arguments):
    code = main(["bench", *map(str, arguments), "--json", "--provider", "cpu", "--threads", "1"])
    return code, json.loads(capsys.readouterr().out)


# --- The stock quantiser ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_is_rounded_by_the_definition(bits):
    """Against the documented layout, entry by entry in float64."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((5, 40)).astype(np.float32)  # 40: the last block is padded
    weight[random.random(weight.shape) < 0.6] = 0
    whole, scales = stock.quantise_blocks(weight, bits)
    middle = 1 << (bits - 1)
    if bits == 4:
        whole = np.stack([whole & 15, whole >> 4], axis=-1).reshape(5, 2, 32)
    values = (whole.astype(np.float64) - middle) * scales[:, :, None]
    values = values.reshape(5, 64)[:, :40]
    assert (values[weight == 0] == 0).all()
    steps = np.repeat(np.abs(scales), 32, axis=1)[:, :40]
    # Half a step; a whole one at the end of the range that has one number less.
    assert (np.abs(values - weight) <= steps * 1.0001).all()
    assert (np.abs(values - weight) <= steps * 0.5001).mean() > 0.95
    assert np.abs(scales).max(axis=1) == pytest.approx(np.abs(weight).max(axis=1) / middle)


def test_it_writes_what_onnxruntimes_own_quantiser_writes(tmp_path):
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    weight = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    path = product(tmp_path, weight)
    made = stock.write_stock(inspect(path), 4, folder(tmp_path, "ours"))
    theirs = quantizer.MatMulNBitsQuantizer(
        onnx.load(path), block_size=32, is_symmetric=True, accuracy_level=4
    )
    theirs.process()
    node = next(n for n in theirs.model.model.graph.node if n.op_type == "MatMulNBits")
    held = {t.name: numpy_helper.to_array(t) for t in theirs.model.model.graph.initializer}
    mine = onnx.load(made.path)
    ours = {t.name: numpy_helper.to_array(t) for t in mine.graph.initializer}
    whole, scales = (ours[name] for name in mine.graph.node[0].input[1:3])
    assert np.allclose(scales.ravel(), held[node.input[2]].ravel(), rtol=1e-6)
    # The same numbers but for ties in rounding.
    assert (whole == held[node.input[1]].reshape(whole.shape)).mean() > 0.99


def folder(parent, name):
    (parent / name).mkdir()
    return parent / name


def product(tmp_path, weight, op="MatMul", inputs=("x", "w"), sparse=False, **attributes):
    """y = x @ w, or a Gemm with a bias; w dense or as a sparse initializer."""
    held, coo = [numpy_helper.from_array(np.arange(16, dtype=np.float32), "b")], []
    if sparse:
        where = np.flatnonzero(weight.reshape(-1)).astype(np.int64)
        coo = [helper.make_sparse_tensor(
            numpy_helper.from_array(weight.reshape(-1)[where], "w"),
            numpy_helper.from_array(where, "i"), weight.shape,
        )]  # fmt: skip
    else:
        held.append(numpy_helper.from_array(weight, "w"))
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), ["y"], name="n", **attributes)], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])],
        held, sparse_initializer=coo,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm turned"])
def test_stock_versions_compute_the_product(tmp_path, bits, sparse, kind):
    random = np.random.default_rng(2)
    weight = random.standard_normal((64, 16)).astype(np.float32)
    weight[random.random(weight.shape) < 0.7] = 0
    stored = np.ascontiguousarray(weight.T) if kind == "Gemm turned" else weight
    if kind == "MatMul":
        path = product(tmp_path, stored, sparse=sparse)
    else:
        path = product(tmp_path, stored, "Gemm", ("x", "w", "b"), sparse,
                       transB=int(kind == "Gemm turned"))  # fmt: skip
    made = stock.write_stock(inspect(path), bits, folder(tmp_path, "made"))
    assert made.quantised == ["w"]
    onnx.checker.check_model(onnx.load(made.path))
    held = onnx.load(made.path)
    assert [t.name for t in held.graph.initializer if t.name == "w"] == []
    x = random.standard_normal((3, 64)).astype(np.float32)
    wanted = x.astype(np.float64) @ weight + (0 if kind == "MatMul" else np.arange(16))
    opened = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    found = opened.run(None, {"x": x})[0]
    near = agreement([found], [wanted.astype(np.float32)])
    assert near["rms"] < (0.02 if bits == 8 else 0.2)


def test_what_cannot_be_quantised_is_said(tmp_path):
    path = product(tmp_path, np.ones((64, 16), np.float32), "Gemm", ("x", "w", "b"), alpha=2.0)
    with pytest.raises(UserInputError, match="no stock int4 version .* alpha"):
        stock.write_stock(inspect(path), 4, folder(tmp_path, "made"))


# --- The command ------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["stock", "stock-fp32", "stock-int8", "stock-int4"])
def test_bench_against_stock(model, against, capsys):
    code, found = run(capsys, model, "--against", against, *SHORT)
    assert code == 0, found
    assert not found["files"]["against"]["kernels"]["ours"]
    assert found["files"]["model"]["kernels"]["ours"] == kernels.available()[0]
    limit = {"stock": 1e-3, "stock-fp32": 1e-3, "stock-int8": 0.15, "stock-int4": 0.5}[against]
    assert 0 <= found["agreement"]["rms"] <= limit
    built = found["files"]["against"]["built"]
    if against == "stock":
        assert built is None
    elif against == "stock-fp32":
        assert (built["products"], built["bits"], built["left"]) == (15, 32, [])
    else:
        assert found["agreement"]["rms"] > 1e-6  # it is another one
        # Seven matrices in each of two layers, and the head.
        assert (built["products"], built["bits"], built["left"]) == (15, int(against[-1]), [])
        dense = found["files"]["model"]["dense_weight_bytes"]
        assert found["files"]["against"]["dense_weight_bytes"] < dense
    for entry in found["results"]:
        speeds = entry["model"]["per_s"]
        assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"]
        assert len(entry["against"]["seconds"]) == 3
        assert entry["speedup"]["min"] <= entry["speedup"]["median"] <= entry["speedup"]["max"]
    for file in found["files"].values():
        assert file["load_s"] > 0


def test_a_broken_reference_is_not_timed(model, monkeypatch, capsys):
    """A quantiser that forgets the signs: refused before anything is timed."""
    sound = stock.quantise_blocks

    def broken(weight, bits):
        whole, scales = sound(weight, bits)
        return whole, np.abs(scales)

    monkeypatch.setattr(stock, "quantise_blocks", broken)
    monkeypatch.setattr(benchmark, "_interleaved", lambda *_: pytest.fail("it was timed"))
    code, found = run(capsys, model, "--against", "stock-int8", *SHORT)
    assert code == VerificationError.exit_code
    assert "moved a value by more than a step" in found["error"]


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_next_to_nothing_are_no_fault(tmp_path, bits):
    """Steps that are subnormal, or none at all, beside sound ones."""
    weight = np.random.default_rng(2).standard_normal((128, 4)).astype(np.float32)
    weight[:32, 0], weight[:32, 1] = 1e-42, 1e-45
    weight[1:32:2, :2] *= -1
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx")
    (tmp_path / "stock").mkdir()
    written = stock.write_stock(inspect(tmp_path / "model.onnx"), bits, tmp_path / "stock")
    assert written.quantised == ["w"]


def test_a_stock_product_that_computes_something_else_is_found(model, monkeypatch, capsys):
    """Whole numbers of two rows exchanged behind the check of the values."""
    alone = stock._product_alone

    def exchanged(whole, scales, rows, columns, bits):
        return alone(whole[[1, 0, *range(2, rows)]], scales, rows, columns, bits)

    monkeypatch.setattr(stock, "_product_alone", exchanged)
    code, found = run(capsys, model, "--against", "stock-int4", *SHORT)
    assert code == VerificationError.exit_code
    assert "4-bit product is off by" in found["error"]


def test_four_bits_may_change_every_score(model, monkeypatch, capsys):
    """How far the scores move is said, and is no reason to refuse."""
    far = {"rms": 1.3, "largest": 2.0, "same_top": 0.0}
    monkeypatch.setattr(benchmark, "agreement", lambda *_: far)
    code, found = run(capsys, model, "--against", "stock-int4", *SHORT)
    assert code == 0, found
    assert found["agreement"]["rms"] == 1.3
    code, found = run(capsys, model, "--against", "stock", *SHORT)
    assert code == VerificationError.exit_code
    assert "so it is no reference" in found["error"]


def test_usual_lengths_are_those_the_model_can_take(model):
    file = inspect(model)  # at most 128 tokens
    assert list(benchmark._lengths(file, None, (32, 128, 512), 0)) == [32, 128]
    assert list(benchmark._lengths(file, None, (32, 128, 512), 16)) == [32]
    assert list(benchmark._lengths(file, None, (512,), 16)) == [112]
    assert list(benchmark._lengths(file, (7,), (32,), 16)) == [7]


def test_layers_name_kernels_and_bytes(tmp_path, capsys):
    """One sparse matrix large enough for our kernels, one dense."""
    random = np.random.default_rng(3)
    sparse = random.standard_normal((256, 256)).astype(np.float32)
    sparse[random.random(sparse.shape) < 0.9] = 0
    dense = random.standard_normal((256, 256)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="pruned"),
         helper.make_node("MatMul", ["h", "d"], ["y"], name="whole")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 256])],
        [numpy_helper.from_array(sparse, "w"), numpy_helper.from_array(dense, "d")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx")
    page = tmp_path / "bench.html"
    code, found = run(capsys, tmp_path, "--against", "stock", "--layers", "--html", page,
                      "--repetitions", 2)  # fmt: skip
    assert code == 0, found
    for side in ("model", "against"):
        rows = found["layers"][side]["run"]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert all(row["seconds"] >= 0 for row in rows)
    stock_rows = {row["node"]: row for row in found["layers"]["against"]["run"]}
    assert set(stock_rows) == {"pruned", "whole"}
    assert all(row["weight_bytes"] == 256 * 256 * 4 for row in stock_rows.values())
    assert {row["kernel"] for row in stock_rows.values()} == {"cpu"}
    if kernels.available()[0]:
        assert found["files"]["model"]["kernels"]["products"] == 1
        ours = [r for r in found["layers"]["model"]["run"] if r["kernel"].startswith("ours")]
        assert len(ours) == 1
        if hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
            assert ours[0]["node"] == "pruned"
            assert 0 < ours[0]["weight_bytes"] < 256 * 256 * 4 / 2
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "pruned" in text


def test_the_picture_is_sound_svg_and_escapes_names(tmp_path):
    speed = {"min": 9.0, "median": 10.0, "max": 12.0}
    result = {
        "files": {"model": {"path": "<script>&"}, "against": {"path": "b"}},
        "results": [
            {"workload": "decode at 8", "unit": "tokens/s", "model": {"per_s": speed},
             "against": {"per_s": {**speed, "median": 5.0, "min": 4.0}},
             "speedup": {"median": 2.0}}
        ],
    }  # fmt: skip
    root = ElementTree.fromstring(picture(result))
    bars = [e for e in root.iter("rect") if float(e.get("height")) > 12]
    widths = {bar.get("class"): float(bar.get("width")) for bar in bars}
    assert widths["model"] == pytest.approx(2 * widths["against"], rel=0.01)
    assert "<script>&" in [e.text for e in root.iter("text")]


def test_agreement_by_hand():
    wanted = [np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)]
    found = [np.array([[3.0, 3.0], [0.0, 0.0]], np.float32)]
    assert agreement(found, wanted) == {"rms": 0.2, "largest": 0.25, "same_top": 0.5}
    assert agreement([np.ones((1, 2))], [np.ones((2, 1))])["rms"] == float("inf")


# --- Predictions ------------------------------------------------------------------------------


def report(folder, speedup=2.0, context=8, threads=1):
    counts = {"predicted_decode_speedup": speedup, "decode_context": context,
              "decode_threads": threads}  # fmt: skip
    passes = [{"name": "fold", "counts": {}}, {"name": "allocate-budget", "counts": counts}]
    (folder / "elsa_report.json").write_text(json.dumps({"passes": passes}))


def ratios(median=1.5):
    return [{"workload": "decode at 8", "speedup": {"median": median}}, {"workload": "prefill 8"}]


def test_a_prediction_stands_beside_what_was_measured(tmp_path):
    report(tmp_path)
    predicted = prediction_of(tmp_path)
    found = compare_prediction(predicted, ratios(), 1, False)
    assert (found["measured"], found["off"], found["why"]) == (1.5, -0.25, None)
    for threads, quantised, results, why in (
        (2, False, ratios(), "give --threads 1"),
        (1, True, ratios(), "--against stock-fp32"),
        (1, False, [], "--context 8"),
    ):
        found = compare_prediction(predicted, results, threads, quantised)
        assert found["measured"] is None
        assert why in found["why"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"passes": 3}', '{"passes": [3, {"counts": 1}]}', "{}",
             '{"passes": [{"counts": {"predicted_decode_speedup": "fast"}}]}',
             '{"passes": [{"counts": {"predicted_decode_speedup": 0, "decode_context": 8,'
             ' "decode_threads": 1}}]}']
)  # fmt: skip
def test_a_damaged_report_predicts_nothing(tmp_path, text):
    (tmp_path / "elsa_report.json").write_text(text)
    assert prediction_of(tmp_path) is None
    assert compare_prediction(None, ratios(), 1, False) is None


def test_bench_prints_the_prediction_and_the_clock(tmp_path, capsys):
    path = product(tmp_path, np.ones((64, 16), np.float32))
    report(tmp_path)
    arguments = [
        "bench",
        str(path),
        "--against",
        "stock",
        "--repetitions",
        "2",
        "--provider",
        "cpu",
    ]
    assert main([*arguments, "--threads", "1", "--clock", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "predicted by allocate-budget: 2.00x over dense float32 in decoding at 8" in text
    assert "not measured: give --against" in text
    assert "cpu time" in text
    assert main([*arguments, "--clock", "cpu"]) == 2
    assert "--threads 1" in capsys.readouterr().err
