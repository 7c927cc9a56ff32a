"""--dry-run and allocate-budget promise bytes; the file has them, quantised or not."""

from pathlib import Path

import pytest

import elsa_compile
from elsa_compile import frontend
from elsa_compile.compiler import CompileArgs
from elsa_compile.estimate import estimate
from elsa_compile.export import export
from elsa_compile.passes import AllocateBudget, AllocateUniform, PruneMagnitude, QuantizeWeights
from elsa_compile.recipe import Recipe

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
RULES = {
    "int8": {},
    "int4 all over": {"bits": "int4", "group_size": 32, "scales": "float16", "head": "int4",
                      "embedding": "int4"},
}  # fmt: skip


def written(passes, path):
    program = frontend.load(TINY)
    elsa_compile.apply(program, *passes)
    return export(program, path), program


@pytest.mark.parametrize(("rule", "sparsity"), [("int8", 0.95), ("int4 all over", 0.5)])
def test_a_dry_run_predicts_quantised_files(rule, sparsity, tmp_path):
    passes = (
        AllocateUniform(sparsity=sparsity), PruneMagnitude(), QuantizeWeights(**RULES[rule])
    )  # fmt: skip
    found = estimate(CompileArgs(model=TINY, output=tmp_path / "x.onnx", recipe=Recipe(passes)))
    result, _ = written(passes, tmp_path / "model.onnx")
    assert found.output_bytes == pytest.approx(result.model_bytes, rel=0.04)
    floats = sum(r.dense_bytes if r.float_bytes is None else r.float_bytes for r in result.records)
    graph = result.model_bytes - sum(record.stored_bytes for record in result.records)
    assert found.dense_bytes == pytest.approx(floats + graph, rel=0.01)


def test_a_budget_of_int8_is_met(tmp_path):
    size = 600_000
    passes = (AllocateBudget(size=f"{size}b", dtype="int8"), PruneMagnitude(), QuantizeWeights())
    result, program = written(passes, tmp_path / "model.onnx")
    predicted = program.history[0].stats.counts["predicted_bytes"]
    assert 0.995 * size < predicted <= size
    assert result.model_bytes == pytest.approx(predicted, rel=0.03)
