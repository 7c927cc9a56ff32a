"""onnxruntime's int8 activations: products are judged one by one, scores of a model are not."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import elsa_compile
from elsa_compile.passes import QuantizeWeights
from elsa_compile.recipe import Recipe
from elsa_compile.runtime import rounded_products
from elsa_compile.runtime.errors import VerificationError
from elsa_compile.runtime.onnx_file import inspect
from elsa_compile.runtime.rounded_products import try_products
from elsa_compile.runtime.verify import verify
from elsa_compile.verify_export import rounding_warning


def activations(path):
    """The check of that name."""
    found = verify(path, provider="cpu", threads=1)
    (check,) = [check for check in found.checks if check.name == "activations"]
    return found, check


class Chaos(torch.nn.Module):
    """Outputs that mean nothing: each layer blows small differences up, as what it reads is huge.

    What rounding does to the first activations is noise a hundred times larger in the last ones.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(5))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randn(64, 64, generator=generator) * 0.6)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


def test_outputs_that_mean_nothing_are_no_fault_of_the_file(tmp_path):
    path = tmp_path / "model.onnx"
    example = (torch.randn(4, 64),)
    elsa_compile.compile(Chaos(), path, Recipe((QuantizeWeights(),)), example_inputs=example)
    found, check = activations(path)
    assert found.ok
    assert check.difference < 1
    moved = float(check.detail.rpartition("outputs by ")[2].partition(",")[0])
    assert moved > 0.5, "such a model is wanted as a bound on outputs would refuse"


@pytest.fixture(scope="module")
def compiled(llama_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    elsa_compile.compile(llama_folder, path, Recipe((QuantizeWeights(),)))
    return path


@pytest.mark.parametrize("damage", ["scale", "sign", "row"])
def test_wrong_scales_and_signs_in_a_file_are_refused(compiled, damage, tmp_path):
    model = onnx.load(str(compiled))
    name = "model.layers.1.mlp.up_proj.weight.scale"
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    scale = numpy_helper.to_array(tensor).copy()
    if damage == "row":
        scale[7] *= 4
    else:
        scale *= {"scale": 1.1, "sign": -1}[damage]
    tensor.CopyFrom(numpy_helper.from_array(scale, name))
    onnx.save(model, tmp_path / "model.onnx")
    report = compiled.with_name("elsa_report.json").read_text()
    (tmp_path / "elsa_report.json").write_text(report)
    found = verify(tmp_path, provider="cpu", threads=1)
    failed = [check.name for check in found.checks if check.ok is False]
    assert failed == ["reference"]  # the scales are wrong, onnxruntime multiplies them well
    with pytest.raises(VerificationError, match="reference: largest difference"):
        found.raise_if_failed()


@pytest.mark.parametrize("fault", ["scale", "sign", "zero point", "one row", "not a number"])
def test_a_kernel_that_multiplies_wrongly_is_refused(compiled, fault, monkeypatch):
    """By a session that opens the product with one number in it changed."""
    honest, opened = rounded_products._alone, []

    def changed(model, constants, node):
        alone = honest(model, constants, node)
        scales = [t for t in alone.graph.initializer if t.name.endswith(".scale")]
        if opened or not scales:
            return alone
        opened.append(node.name)
        values = numpy_helper.to_array(scales[0]).copy()
        if fault == "one row":
            values.reshape(-1)[3] *= 1.2
        elif fault == "zero point":
            maker = next(n for n in alone.graph.node if n.op_type == "DequantizeLinear")
            zeros = np.full(values.shape, 3, np.int8)
            alone.graph.initializer.append(numpy_helper.from_array(zeros, "zeros"))
            maker.input.append("zeros")
        else:
            values *= {"scale": 1.05, "sign": -1, "not a number": np.nan}[fault]
        scales[0].CopyFrom(numpy_helper.from_array(values, scales[0].name))
        return alone

    monkeypatch.setattr(rounded_products, "_alone", changed)
    found, check = activations(compiled)
    assert not found.ok
    assert not check.difference <= 1
    assert f"product {opened[0]!r}" in check.detail
    assert "times what rounding may do" in check.detail


def lone_product(tmp_path, rows=96, columns=256, zeros=0.0, **changes):
    """A file of one int8 product; changes: op_type, dead (a row of zeros with scale 1)."""
    random = np.random.RandomState(1)
    whole = random.randint(-127, 128, (columns, rows)).astype(np.int8)
    whole[random.random_sample(whole.shape) < zeros] = 0
    scale = np.exp(random.standard_normal(rows)).astype(np.float32) / 127
    if changes.get("dead"):
        whole[:, 5], scale[5] = 0, 1
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1)]
    if changes.get("op_type") == "Gemm":
        nodes = [helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0]),
                 helper.make_node("DequantizeLinear", ["v", "s"], ["d"], axis=0),
                 helper.make_node("Gemm", ["x", "d"], ["y"], transB=1, name="n")]  # fmt: skip
    else:
        nodes.append(helper.make_node("MatMul", ["x", "d"], ["y"], name="n"))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(whole, "w"), numpy_helper.from_array(scale, "s")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx")
    return inspect(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "options",
    [{}, {"op_type": "Gemm"}, {"dead": True}, {"zeros": 0.97}, {"columns": 4096, "rows": 16}],
    ids=str,
)
def test_a_right_product_is_within_what_rounding_may_do(options, tmp_path):
    found = try_products(lone_product(tmp_path, **options), 1, "cpu")
    assert (found.products, found.tried, found.left) == (1, 1, 0)
    # The errors are those of rounding indeed: sums of them of a standard deviation of 1 / sqrt(12)
    # steps are seen at some 3 to 4.5 deviations of the 5 / sqrt(1 / 12) allowed, Gemm is exact.
    assert found.worst < 0.35
    assert found.worst > (0.05 if "op_type" not in options else 0)


def test_equal_kinds_are_tried_once(compiled):
    found = try_products(inspect(compiled), 1, "cpu")
    # q and o, k and v, gate and up, down, head.
    assert (found.products, found.tried, found.left) == (15, 5, 0)


def test_a_perplexity_that_rounding_moves_is_said():
    assert rounding_warning(20.0, 20.09) is None
    assert rounding_warning(float("inf"), float("inf")) is None
    assert "21.0000 instead of 20.0000" in rounding_warning(20.0, 21.0)
    assert rounding_warning(20.0, 19.0) is not None


def test_a_compilation_warns_of_it_and_writes_the_file(
    llama_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("elsa_compile.verify_export.ROUNDING_WORTH_SAYING", 0.0)
    path = tmp_path / "model.onnx"
    report = elsa_compile.compile(
        llama_folder, path, Recipe((QuantizeWeights(),)), eval_data=text_file, window=32,
        max_windows=4,
    ).report  # fmt: skip
    assert path.is_file()
    exact, rounded = (report.accuracy[k] for k in ("onnxruntime_exact", "onnxruntime"))
    assert rounded != exact
    (said,) = [warning for warning in report.warnings if "rounds activations" in warning]
    assert f"perplexity {rounded:.4f} instead of {exact:.4f}" in said
    assert all(check["ok"] is not False for check in report.verification["checks"])
