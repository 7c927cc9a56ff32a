"""allocate-budget by latency: the arithmetic on a made-up kernel table, the cost on real models."""

import importlib.util
from pathlib import Path

import pytest
import torch

import elsa_compile
from elsa_compile import decode_cost, frontend
from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import Context
from elsa_compile.passes import AllocateBudget, allocate_budget
from elsa_compile.passes.latency import parse_speedup
from elsa_compile.progress import Silent
from elsa_compile.runtime import packed
from elsa_compile.runtime.decode_cost import DecodeCost

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"
OTHER_S = 2e-4
DENSE_S = 1e-8  # a weight


def synthetic():
    """Time in proportion to the density: twice as fast at 50 %, ten times at 90 %."""
    path = ROOT / "tests" / "runtime" / "test_calibrate.py"
    spec = importlib.util.spec_from_file_location("calibrate_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    curve = {0.5: 2.0, 0.9: 10.0, 0.99: 100.0}
    faster = {s: 2 * g for s, g in curve.items()}
    return module.made({"float32": curve, "bfloat16": faster, "int8": faster}, DENSE_S)


@pytest.fixture(scope="module")
def loaded():
    return frontend.load(TINY)


@pytest.fixture
def program(loaded):
    loaded.plans.clear()
    return loaded


@pytest.fixture
def solve(program, monkeypatch):
    """Options of the pass -> its statistics, on the made-up table and a made-up measurement."""
    table = synthetic()
    monkeypatch.setattr(allocate_budget, "load_table", lambda threads: table)
    monkeypatch.setattr(packed, "taken", lambda n, k, nonzeros, dtype: nonzeros <= 0.5 * n * k)
    names = tuple(w.name for w in program.weights.values() if w.kind == "linear" or w.is_head)
    entries = sum(program.weights[name].parameter.numel() for name in names)

    def measure(given, context, threads):
        assert given is program
        return DecodeCost(context, threads, entries * DENSE_S + OTHER_S, OTHER_S, OTHER_S, names)

    ctx = Context(None, torch.device("cpu"), 0, Silent(), measure_decode=measure)
    return lambda **options: AllocateBudget(**options).run(program, ctx)


def seconds(program, dtype="float32"):
    """A token by the made-up rules, from the plans: independent of the pass's own arithmetic."""
    total = OTHER_S
    for weight in program.weights.values():
        if weight.kind != "linear" and not weight.is_head:
            continue
        plan = program.plans.get(weight.name)
        sparsity = plan.sparsity if plan is not None and plan.skipped is None else 0.0
        gain = 1 / (1 - sparsity) if sparsity >= 0.5 else 1.0
        if dtype != "float32":
            gain = 2 * gain if sparsity >= 0.5 else {"int8": 3.0, "bfloat16": 1.0}[dtype]
        total += weight.parameter.numel() * DENSE_S / gain
    return total


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("fp32", 1.5), ("fp32", 2.0), ("fp16", 2.0), ("bf16", 2.5), ("int8", 3.5)]
)
def test_the_plan_reaches_the_speed_and_no_more(program, solve, dtype, wanted):
    stats = solve(latency=f"{wanted}x", dtype=dtype)
    planned = seconds(program, {"bf16": "bfloat16", "int8": "int8"}.get(dtype, "float32"))
    program.plans.clear()
    found = seconds(program) / planned
    # The plan's sparsities are short decimal numbers.
    assert found == pytest.approx(stats.counts["predicted_decode_speedup"], rel=1e-4)
    assert wanted <= stats.counts["predicted_decode_speedup"]
    # Fewer zeros would not do, unless the first that the kernels take are enough.
    assert found < wanted * 1.001 or stats.counts["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert stats.counts["decode_context"] == 128
    assert any("predicted" in note for note in stats.notes)


def test_what_cannot_be_reached_says_what_can(solve):
    with pytest.raises(UserInputError) as caught:
        solve(latency="50x", limit=0.9)
    said = str(caught.value)
    assert "latency 50x cannot be reached" in said
    assert "0.20 ms are no products" in said
    assert "lm_head.weight" in said or "embed_tokens.weight" in said
    # What it says can be reached really can, and a little more cannot.
    reachable = float(said.partition("predicted to be ")[2].partition("x")[0])
    solve(latency=f"{reachable - 0.01:.2f}x", limit=0.9)
    with pytest.raises(UserInputError, match="cannot be reached"):
        solve(latency=f"{reachable + 0.01:.2f}x", limit=0.9)


def test_values_of_two_bytes_are_told_of(program, solve):
    """Kernels keep them so, which the plan for float32 does not know."""
    before = {name: w.parameter.detach().clone() for name, w in program.weights.items()}
    said = "all weights are bfloat16 numbers"
    try:
        for weight in program.weights.values():
            weight.parameter.data.copy_(weight.parameter.data.to(torch.bfloat16))
        assert any(said in note for note in solve(latency="1.5x").notes)
        assert not any(said in note for note in solve(latency="1.5x", dtype="bf16").notes)
        planned = next(w for w in program.weights.values() if w.kind == "linear")
        planned.parameter.data.view(-1)[-1] = 1 + 2.0**-20
        assert not any(said in note for note in solve(latency="1.5x").notes)
    finally:
        for name, values in before.items():
            program.weights[name].parameter.data.copy_(values)


def test_an_estimate_says_that_it_is_one(program, solve):
    table = allocate_budget.load_table(None)
    ctx = Context(None, torch.device("cpu"), 0, Silent())
    stats = AllocateBudget(latency="1.5x").run(program, ctx)
    assert any("estimated, nothing was run" in note for note in stats.notes)
    assert table.machine.threads == 1


def test_without_a_table_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = elsa_compile.Recipe((AllocateBudget(latency="2x", threads=1),))
    with pytest.raises(UserInputError, match="run: elsa-run calibrate --threads 1"):
        elsa_compile.compile(TINY, tmp_path / "model.onnx", recipe)


def test_only_decoders_decode(mlp, solve, monkeypatch):
    with pytest.raises(UserInputError, match="latency is about decoding"):
        elsa_compile.apply(mlp, AllocateBudget(latency="2x"), example_inputs=(torch.zeros(2, 16),))


@pytest.mark.parametrize(("text", "wanted"), [("2.5x", 2.5), ("2.5", 2.5), (3, 3.0), (" 2 X", 2.0)])
def test_speedups_are_read(text, wanted):
    assert parse_speedup(text, "") == wanted


@pytest.mark.parametrize("text", ["", "x", "fast", "-2x", "0.5x", "2.5xx", "2ms", "nanx"])
def test_speedups_that_are_none_are_refused(text):
    with pytest.raises(UserInputError, match="allocate-budget: latency is .*as in 2.5x"):
        AllocateBudget(latency=text)


@pytest.mark.parametrize(("family", "beside"), [("llama-tied", False), ("gpt2", True)])
def test_the_cost_of_a_token_knows_every_product(family, beside, make_family, monkeypatch):
    """Really exported and timed; gpt2 has biases, the other's head is its embedding.

    beside: the embedding as if it were too large for one file.
    """
    if beside:
        monkeypatch.setattr("elsa_compile.runtime.decode_cost._IN_FILE_BYTES", 0)
    program = frontend.from_module(make_family(family))
    cost = decode_cost.measure(program, 16, 1)
    wanted = sorted(w.name for w in program.weights.values() if w.kind == "linear" or w.is_head)
    assert sorted(cost.products) == wanted
    assert 0 < cost.other_s <= cost.seconds
    assert 0 < cost.sparse_other_s <= cost.seconds
    assert cost.measured
