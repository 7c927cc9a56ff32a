"""The whole system on a model of two layers; run this first."""

import json

import numpy as np
import onnx
import pytest

import elsa_compile
from elsa_compile.recipe import Recipe


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, llama_folder, text_file):
    """A compilation with perplexity, in a folder that did not exist."""
    output = tmp_path_factory.mktemp("out") / "new" / "model.onnx"
    return elsa_compile.compile(
        llama_folder, output, "wanda", data=text_file, eval_data=text_file, sparsity=0.7,
        window=32, max_windows=8,
    )  # fmt: skip


def test_every_companion_lies_beside_the_model(compiled):
    names = {path.name for path in compiled.path.parent.iterdir()}
    assert names >= {
        "model.onnx", "config.json", "genai_config.json", "tokenizer.json", "elsa_recipe.yaml",
        "elsa_plan.yaml", "elsa_report.json", "elsa_report.html",
    }  # fmt: skip
    assert {path.name for path in compiled.files} == names
    assert compiled.files[0] == compiled.path


def test_the_weights_in_the_file_are_as_sparse_as_planned(compiled):
    model = onnx.load(str(compiled.path))
    sparse = {s.values.name: s for s in model.graph.sparse_initializer}
    planned = [weight for weight, _ in compiled.program.planned()]
    assert len(planned) == 14
    for weight in planned:
        stored = sparse[weight.name]
        size = int(np.prod(stored.dims))
        rows = weight.matrix_shape[0]
        # Wanda rounds within each row.
        assert abs(stored.values.dims[0] / size - 0.3) < rows / size + 0.02


def test_perplexity_is_equal_in_torch_and_onnxruntime(compiled):
    accuracy = compiled.report.accuracy
    assert accuracy["onnxruntime"] == pytest.approx(accuracy["compiled"], rel=1e-4)
    assert accuracy["tokens"] == 8 * 31
    assert accuracy["dense"] != accuracy["compiled"]


def test_every_check_was_made_and_passed(compiled):
    checks = {check["name"]: check["ok"] for check in compiled.report.verification["checks"]}
    assert set(checks) >= {"loads", "finite", "cache", "batch", "reference", "logits", "perplexity"}
    assert all(checks.values())


def test_the_recipe_in_the_file_loads_back_to_equal_passes(compiled):
    model = onnx.load(str(compiled.path))
    entries = {entry.key: entry.value for entry in model.metadata_props}
    beside = (compiled.path.parent / "elsa_recipe.yaml").read_text(encoding="utf-8")
    wanted = Recipe.preset("wanda").with_sparsity(0.7)
    assert Recipe.parse(entries["elsa_compile.recipe"]) == wanted
    assert Recipe.parse(beside) == wanted


def test_the_report_is_json_and_repeats_the_probe(compiled):
    report = json.loads((compiled.path.parent / "elsa_report.json").read_text(encoding="utf-8"))
    assert report["schema_version"] == 1
    assert report["probe"]["file"] == "model.onnx"
    html = (compiled.path.parent / "elsa_report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 2


def test_elsa_run_verifies_the_file(compiled, capsys):
    from elsa_compile.runtime.cli import main

    assert main(["verify", str(compiled.path), "--json", "--provider", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is True
    assert {c["name"] for c in result["checks"] if c["ok"]} >= {"cache", "batch", "reference"}


def test_the_edited_plan_can_be_fed_back(compiled, llama_folder, tmp_path):
    text = (compiled.path.parent / "elsa_plan.yaml").read_text(encoding="utf-8")
    plan = tmp_path / "plan.yaml"
    plan.write_text(text.replace("sparsity: 0.7", "sparsity: 0.25", 1), encoding="utf-8")
    program = elsa_compile.load(llama_folder)
    from elsa_compile.passes import AllocatePlan, PruneMagnitude

    elsa_compile.apply(program, AllocatePlan(path=str(plan)), PruneMagnitude())
    found = [p.sparsity for p in program.plans.values() if p.skipped is None]
    assert sorted(found) == [0.25] + [0.7] * 13
