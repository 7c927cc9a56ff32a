"""What every registered pass promises; a new pass is tested here without being named."""

import copy

import pytest
import torch

import elsa_compile
from elsa_compile import facts, frontend, pipeline
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, explain, make_pass, registered_passes
from elsa_compile.passes import AllocateUniform, PruneMagnitude, QuantizeWeights
from elsa_compile.passes.allocate_plan import plan_to_yaml
from elsa_compile.progress import Silent
from elsa_compile.recipe import Recipe

NAMES = sorted(registered_passes())
SPARSITY = 0.6
NECESSARY = {
    "align": {"pattern": "2:4"},
    "allocate-budget": {"size": "70%"},
    "quantize-weights": {"head": "none"},
}


def test_there_are_passes():
    assert {"allocate-uniform", "prune-magnitude", "prune-wanda", "prune-sparsegpt"} <= set(NAMES)


@pytest.fixture(scope="module")
def original(make_family):
    return make_family("llama")


@pytest.fixture
def program(original):
    return frontend.from_module(copy.deepcopy(original))


@pytest.fixture
def make(tmp_path, original):
    """Name -> the pass, with what it cannot do without."""

    def build(name):
        if name != "allocate-plan":
            return make_pass(name, NECESSARY.get(name, {}))
        planned = frontend.from_module(copy.deepcopy(original))
        elsa_compile.apply(planned, AllocateUniform(sparsity=0.3))
        (tmp_path / "plan.yaml").write_text(plan_to_yaml(planned), encoding="utf-8")
        return make_pass(name, {"path": str(tmp_path / "plan.yaml")})

    return build


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (2, 24), generator=generator) for _ in range(6)]


def supply(step):
    """Passes that establish what `step` requires."""
    before = []
    if Fact.PLANNED in step.requires:
        before.append(AllocateUniform(sparsity=SPARSITY, ignore=["re:.*layers\\.1\\.mlp.*"]))
    if Fact.MASKED in step.requires:
        before.append(PruneMagnitude())
    if Fact.QUANTIZED in step.requires:
        before.append(QuantizeWeights(head="none"))
    return before


def run(program, step):
    return elsa_compile.apply(program, *supply(step), step, data=batches())


def values(program):
    return {name: weight.parameter.detach().clone() for name, weight in program.weights.items()}


@pytest.mark.parametrize("name", NAMES)
def test_options_survive_yaml(name, make):
    recipe = Recipe((make(name),))
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_the_explanation_names_every_option_and_fact(name, make):
    cls = registered_passes()[name]
    text = explain(cls)
    assert text.startswith(f"{name}: ")
    for option in make(name).options():
        assert f"  {option}: " in text
    for fact in cls.establishes:
        assert fact.name in text


@pytest.mark.parametrize("name", NAMES)
def test_declared_facts_hold_afterwards(name, make, program):
    step = make(name)
    run(program, step)
    assert step.establishes <= program.facts
    for fact in program.facts:
        facts.check(program, fact)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_planned_stay_bit_identical(name, make, program):
    before = values(program)
    step = make(name)
    run(program, step)
    touched = {weight.name for weight, _ in program.planned()} | set(program.grids())
    untouched = [n for n in before if n not in touched]
    assert "lm_head.weight" in untouched
    for weight in untouched:
        after = program.weights[weight].parameter
        if step.trains:  # the whole model; what is not planned stays dense
            assert int((after == 0).sum()) <= int((before[weight] == 0).sum())
        elif name == "align":  # it moves entries, and changes none
            both = (before[weight].flatten().sort(), after.flatten().sort())
            assert torch.equal(both[0].values, both[1].values)
        else:
            assert torch.equal(before[weight], after)


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_results(name, make, original):
    step = make(name)
    first, second = (
        run(frontend.from_module(copy.deepcopy(original)), step) for _ in range(2)
    )  # fmt: skip
    for weight, value in values(first).items():
        assert torch.equal(value, second.weights[weight].parameter)
    assert plan_to_yaml(first) == plan_to_yaml(second)


@pytest.mark.parametrize("name", [n for n in NAMES if registered_passes()[n].idempotent])
def test_running_twice_equals_running_once(name, make, program):
    step = make(name)
    run(program, step)
    once, graph = values(program), program.to_text()
    elsa_compile.apply(program, step, data=batches())
    for weight, value in once.items():
        assert torch.equal(value, program.weights[weight].parameter)
    assert program.to_text() == graph


@pytest.mark.parametrize("name", NAMES)
def test_the_module_and_the_graph_see_the_same_weights(name, make, program):
    run(program, make(name))
    ids = torch.arange(8)[None]
    wanted = program.module(input_ids=ids, use_cache=False).logits
    from elsa_compile.data import run_row

    found = run_row(program, {"input_ids": ids})[0]
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if registered_passes()[n].needs_data])
def test_missing_data_is_said_before_work_starts(name, make, program):
    step = make(name)
    with pytest.raises(elsa_compile.ElsaError, match="needs calibration data"):
        elsa_compile.apply(program, *supply(step), step)
    assert program.history == []


@pytest.mark.parametrize("name", NAMES)
def test_what_a_pass_requires_is_checked_before_it_runs(name, make, program):
    step = make(name)
    if not step.requires - pipeline.INITIAL:
        pytest.skip("it requires nothing that a fresh program lacks")
    with pytest.raises(elsa_compile.ElsaError, match=f"{name} needs .*put one of these before it"):
        elsa_compile.apply(program, step, data=batches())


@pytest.mark.parametrize("kind", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "1:4", "4x4"])
def test_every_pruner_follows_every_pattern(kind, pattern, program):
    implied = {"2:4": 0.5, "1:4": 0.75}
    sparsity = implied.get(pattern, 0.6)
    step = make_pass(f"prune-{kind}", {})
    options = {"pattern": pattern} | ({} if pattern in implied else {"sparsity": sparsity})
    elsa_compile.apply(program, AllocateUniform(**options), step, data=batches())
    for weight, plan in program.planned():
        zeros = float((weight.parameter == 0).float().mean())
        assert zeros == pytest.approx(sparsity, abs=0.05), weight.name
        assert plan.mask is not None


def test_a_later_pass_that_wakes_a_zero_is_caught(program):
    from dataclasses import dataclass
    from typing import ClassVar

    from elsa_compile.pass_base import Pass, PassStats

    @dataclass(frozen=True, kw_only=True)
    class Careless(Pass):
        """Adds to every weight."""

        name: ClassVar[str] = "careless"
        preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

        def run(self, program, ctx):
            for weight in program.prunable.values():
                weight.parameter.data.add_(0.01)
            return PassStats()

    passes = (AllocateUniform(sparsity=0.5), PruneMagnitude(), Careless())
    with pytest.raises(elsa_compile.ElsaError, match=r"after careless, MASKED .*q_proj.weight has"):
        elsa_compile.apply(program, *passes)


def test_dumps_are_numbered_and_only_of_changes(program, tmp_path):
    ctx = Context(None, torch.device("cpu"), 0, Silent())
    recipe = Recipe.preset("magnitude")
    pipeline.run(program, recipe.passes, ctx, dump=tmp_path / "ir")
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert names[:3] == ["00-traced.txt", "01-allocate-uniform.txt", "02-prune-magnitude.txt"]
    text = (tmp_path / "ir" / "02-prune-magnitude.txt").read_text()
    assert "sparsity 0.5 unstructured, now 0.5000" in text
