"""Rounded activations: simulated as the kernels round, and wanted or not by the file."""

import numpy as np
import onnx
import pytest
import torch

import elsa_compile
from elsa_compile import ElsaError, apply, data, frontend
from elsa_compile.passes import QuantizeActivations, QuantizeWeights
from elsa_compile.recipe import Recipe
from elsa_compile.rounded_activations import RoundedActivations, levels_of, round_blocks, round_rows
from elsa_compile.runtime import reference
from elsa_compile.runtime.session import session


def test_tokens_are_rounded_as_the_kernels_round_them():
    torch.manual_seed(0)
    x = torch.randn(5, 48) * torch.tensor([[1.0], [1e-3], [300.0], [0.0], [1.0]])
    for levels in (127, 9000):
        codes, scales = reference.quantise_tokens(x.numpy(), levels)
        np.testing.assert_allclose(
            round_rows(x, levels).numpy(), codes * scales[:, None], rtol=1e-6
        )
        assert np.abs(codes).max() == levels
    blocks = round_blocks(x, 20)  # 20, 20 and 8 entries
    for start in (0, 20, 40):
        part = slice(start, min(start + 20, 48))
        assert torch.equal(blocks[:, part], round_rows(x[:, part], 127))


def test_products_of_quantised_weights_and_no_others_are_rounded(mlp):
    program = frontend.from_module(mlp, (torch.randn(3, 16),))
    apply(program, QuantizeWeights(ignore=["0.weight"]), QuantizeActivations())
    assert program.activations == "integer"
    # 4.weight is under 1 kB
    assert program.history[-1].stats.counts == {"a_scale_a_token": 1, "a_scale_a_block": 0}
    x = torch.randn(3, 16)
    exact = program.run(x)
    with RoundedActivations(program) as active:
        found = program.run(x)
    assert active.products == 1
    hidden = mlp[1](mlp[0](x)).detach()
    grid = program.grids()["2.weight"]
    whole = (program.weights["2.weight"].matrix() / grid.scale).round().numpy().astype(np.int8)
    levels = levels_of(program.weights["2.weight"], grid)
    assert levels == reference.levels_of(whole) == 32767
    codes, scales = reference.quantise_tokens(hidden.numpy(), levels)
    sums = codes.astype(np.int64) @ whole.T.astype(np.int64)
    product = sums * scales[:, None] * grid.scale.numpy().T + mlp[2].bias.detach().numpy()
    wanted = mlp[4](torch.relu(torch.from_numpy(product).float())).detach()
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.equal(found, exact)
    assert torch.equal(program.run(x), exact)  # only while active


@pytest.mark.parametrize("view", ["module", "graph"])
def test_a_tied_head_and_both_views_are_reached(view, make_family):
    program = frontend.from_module(make_family("llama-tied"))
    apply(program, QuantizeWeights(bits="int4"))
    if view == "graph":
        program.module = None
    ids = torch.arange(12)[None] * 7
    exact = data.logits(program, ids)
    with RoundedActivations(program) as active:
        rounded = data.logits(program, ids)
    assert active.products == 2 * 7 + 1
    gap = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < gap < 0.2


def test_quantised_weights_must_come_first(mlp):
    with pytest.raises(ElsaError, match=r"quantize-activations needs QUANTIZED.*quantize-weights"):
        apply(mlp, QuantizeActivations(), example_inputs=(torch.randn(3, 16),))


@pytest.fixture(scope="module")
def compiled(llama_folder, text_file, tmp_path_factory):
    """float32 and rounded activations: the results of both compilations."""
    results = {}
    for kind in ("float32", "integer"):
        recipe = Recipe((QuantizeWeights(), QuantizeActivations(to=kind)))
        path = tmp_path_factory.mktemp(kind) / "model.onnx"
        results[kind] = elsa_compile.compile(
            llama_folder, path, recipe, eval_data=text_file, window=64, max_windows=4
        )
    return results


def test_the_report_has_both_accuracies(compiled):
    exact, rounded = (compiled[kind].report.accuracy for kind in ("float32", "integer"))
    assert exact["compiled"] == rounded["compiled"]
    assert "compiled_rounded" not in exact
    assert rounded["compiled_rounded"] != rounded["compiled"]
    assert rounded["compiled_rounded"] == pytest.approx(rounded["compiled"], rel=1e-3)
    report = compiled["integer"].report
    assert type(report).from_json(report.to_json()).accuracy == rounded
    from elsa_compile.report import honest_sentences

    assert any("rounded as in our kernels" in sentence for sentence in honest_sentences(report))


def test_our_session_obeys_the_file_and_the_caller(compiled):
    ids = np.arange(9, dtype=np.int64)[None]

    def scores(kind, config=None):
        opened = session(compiled[kind].path, 1, "cpu", config=config, kernels=False)
        feeds = {v.name: np.zeros((1, 2, 0, 8), np.float32) for v in opened.get_inputs()[3:]}
        feeds |= {"input_ids": ids, "attention_mask": ids * 0 + 1, "position_ids": ids}
        return opened.run(["logits"], feeds)[0]

    by_default, exact = scores("integer"), scores("float32")
    level = "session.qdq_matmulnbits_accuracy_level"
    assert np.array_equal(scores("integer", {level: "0"}), exact)
    assert np.array_equal(scores("float32", {level: "4"}), by_default)
    assert np.abs(by_default - exact).max() > 1e-4 * np.abs(exact).max()


def test_a_file_that_says_something_else_is_refused(compiled, tmp_path):
    model = onnx.load(str(compiled["integer"].path))
    entry = next(e for e in model.metadata_props if e.key == "elsa_compile.activations")
    assert entry.value == "integer"
    entry.value = "int3"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ElsaError, match="activations is 'int3', wanted integer or float32"):
        session(tmp_path / "model.onnx", 1, "cpu", kernels=False)
