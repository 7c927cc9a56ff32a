"""Whole neurons and heads: one choice for several matrices, then a smaller dense model."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import elsa_compile
from elsa_compile import apply, frontend
from elsa_compile.channels import Member
from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import make_pass
from elsa_compile.passes import (
    AllocateFisher,
    AllocatePlan,
    AllocateUniform,
    DropDeadUnits,
    PruneElsa,
    PruneMagnitude,
    PruneWanda,
)
from elsa_compile.passes.allocate_plan import plan_to_yaml
from elsa_compile.passes.coupled_units import Coupling, coupled_masks, unit_scores
from elsa_compile.patterns import Heads, Neurons, parse_pattern
from elsa_compile.recipe import Recipe

NEURONS = AllocateUniform(sparsity=0.5, pattern="neurons")
HEADS = AllocateUniform(sparsity=0.5, pattern="heads")


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (2, 24), generator=generator) for _ in range(4)]


@pytest.fixture
def program(make_family):
    return frontend.from_module(make_family("llama"))


def test_a_unit_is_scored_by_all_entries_that_leave_with_it():
    made = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.5, 0.5]])
    read = torch.tensor([[10.0, 20.0, 30.0]])
    members = (Member("made", 0, torch.arange(3)), Member("read", 1, torch.arange(3)))
    coupling = Coupling("read", 3, 1 / 3, members)
    scores = {"made": made, "read": read}
    assert unit_scores(scores, coupling).tolist() == [13.0, 27.0, 31.0]
    masks = coupled_masks(scores, [coupling])
    assert masks["made"].tolist() == [[False, False], [True, True], [True, True]]
    assert masks["read"].tolist() == [[False, True, True]]
    assert coupled_masks(scores, [coupling], {"read": 0.0})["made"].all()


def test_equal_units_leave_from_the_end():
    coupling = Coupling("w", 4, 0.5, (Member("w", 0, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])),))
    mask = coupled_masks({"w": torch.ones(8, 3)}, [coupling])["w"]
    assert mask.any(dim=1).tolist() == [True] * 4 + [False] * 4


def test_neurons_are_those_of_smallest_summed_magnitude(program):
    mlp = program.module.model.layers[0].mlp
    gate, up, down = (
        m.weight.detach().clone() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    sums = gate.abs().sum(1) + up.abs().sum(1) + down.abs().sum(0)
    kept = torch.sort(sums.argsort(descending=True)[:32]).values
    apply(program, NEURONS, PruneMagnitude())
    assert sorted((mlp.gate_proj.weight != 0).any(1).nonzero().flatten().tolist()) == kept.tolist()
    plan = program.plans["model.layers.0.mlp.up_proj.weight"]
    assert plan.pattern == Neurons(64)
    assert program.plans["model.layers.0.self_attn.q_proj.weight"].skipped == (
        "no weight of whole neurons"
    )
    apply(program, DropDeadUnits())
    assert torch.equal(mlp.gate_proj.weight, gate[kept])
    assert torch.equal(mlp.up_proj.weight, up[kept])
    assert torch.equal(mlp.down_proj.weight, down[:, kept])
    assert program.config["intermediate_size"] == 32
    assert plan_to_yaml(program).count("pattern: neurons") == 6


def test_neurons_by_wanda_weigh_the_inputs_they_meet(program):
    """Against scores from the module's own activations."""
    module, rows = program.module, []
    mlp = module.model.layers[0].mlp
    inputs, hidden = [], []
    hooks = [
        mlp.gate_proj.register_forward_hook(lambda m, x, y: inputs.append(x[0].flatten(0, 1))),
        mlp.down_proj.register_forward_hook(lambda m, x, y: hidden.append(x[0].flatten(0, 1))),
    ]
    with torch.no_grad():
        for batch in batches():
            rows.append(module(input_ids=batch))
    for hook in hooks:
        hook.remove()
    x, h = (torch.cat(part).norm(dim=0) for part in (inputs, hidden))
    scores = (mlp.gate_proj.weight.abs() * x).sum(1) + (mlp.up_proj.weight.abs() * x).sum(1)
    scores = scores + (mlp.down_proj.weight.abs() * h).sum(0)
    kept = scores.argsort(descending=True)[:32]
    apply(program, NEURONS, PruneWanda(), data=batches())
    found = (mlp.down_proj.weight != 0).any(0).nonzero().flatten()
    assert set(found.tolist()) == set(kept.tolist())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_heads_leave_with_their_groups(name, make_family):
    program = frontend.from_module(make_family(name))
    apply(program, HEADS, PruneWanda(), DropDeadUnits(), data=batches())
    counts = program.history[-1].stats.counts
    before = 2 if name != "gpt2" else 4
    assert counts["heads"] == 2 * before // 2
    assert {tuple(x.shape[1::2]) for x in program.signature.args[3]} == {(before // 2, 8)}


def test_neurons_of_consecutive_layers_share_the_matrix_between_them(mlp):
    program = frontend.from_module(mlp, (torch.randn(2, 16),))
    x = torch.randn(5, 16)
    apply(program, NEURONS, PruneWanda(), data=[torch.randn(8, 16)])
    assert float((mlp[2].weight == 0).float().mean()) == 0.75
    wanted = mlp(x)
    apply(program, DropDeadUnits())
    assert [tuple(mlp[i].weight.shape) for i in (0, 2, 4)] == [(16, 16), (16, 16), (4, 16)]
    # ReLU(bias) of rows without weights is a constant, which moved into the next bias.
    assert torch.allclose(mlp(x), wanted, atol=1e-5)


def test_layers_may_have_shares_of_their_own(program, tmp_path):
    apply(program, NEURONS)
    head, tail = plan_to_yaml(program).split("model.layers.1.mlp", 1)
    path = tmp_path / "plan.yaml"
    path.write_text(head + "model.layers.1.mlp" + tail.replace("sparsity: 0.5", "sparsity: 0.25"))
    apply(program, AllocatePlan(path=str(path)), PruneMagnitude(), DropDeadUnits())
    widths = [layer.mlp.up_proj.out_features for layer in program.module.model.layers]
    assert widths == [32, 48]


def test_weights_that_share_units_must_be_planned_alike(program):
    with pytest.raises(UserInputError, match="up_proj.weight, which shares its neurons, is not"):
        apply(program, AllocateUniform(pattern="neurons", ignore=["re:.*layers.0.mlp.up_proj.*"]))


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
def test_passes_that_prune_each_matrix_by_itself_refuse(name, program):
    with pytest.raises(UserInputError, match=f"prune-{name}: .* planned as neurons"):
        apply(program, NEURONS, make_pass(f"prune-{name}", {}), data=batches())


def test_what_has_no_whole_units_says_so():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(UserInputError, match="no weight is left to prune"):
        apply(model, HEADS, example_inputs=(torch.randn(2, 4),))
    with pytest.raises(UserInputError, match="couples weights"):
        AllocateFisher(pattern="neurons")


def test_the_pattern_is_text_and_checks_whole_lines():
    assert parse_pattern("heads") == Heads() != Neurons()
    assert str(Heads(4)) == "heads"
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    assert Neurons(4).violation(mask, 0.25) is None
    assert "6 zeros, wanted at least 12" in str(Neurons(4).violation(mask, 0.5))
    mask[2, 3] = False
    assert "no whole rows" in str(Neurons().violation(mask, 0.25))
    with pytest.raises(UserInputError, match="prune-wanda or prune-magnitude"):
        Neurons().keep_mask(torch.ones(2, 2), 0.5)


def test_half_the_mlp_leaves_the_file(llama_folder, text_file, tmp_path):
    recipe = Recipe((NEURONS, PruneWanda(), DropDeadUnits()))
    result = elsa_compile.compile(
        llama_folder, tmp_path / "model.onnx", recipe, data=text_file, eval_data=text_file,
        window=32, max_windows=4,
    )  # fmt: skip
    model = onnx.load(str(result.path))
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    mlp = {name: dims for name, dims in shapes.items() if ".mlp." in name}
    assert len(mlp) == 6
    assert all(sorted(dims) == [32, 32] for dims in mlp.values())
    assert sum(np.prod(dims) for dims in mlp.values()) == 6 * 32 * 32
    assert result.report.verification["ok"]
    accuracy = result.report.accuracy
    assert accuracy["onnxruntime"] == pytest.approx(accuracy["compiled"], rel=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["intermediate_size"] == 32


def test_training_chooses_whole_neurons_and_keeps_more_than_one_shot(make_family):
    """By the loss on the text it was trained on: the layers it keeps have learned to do without."""
    rows, found = batches(), {}
    for name, step in {
        "elsa": PruneElsa(steps=60, lr=1e-2, batch_size=4, interval=4, precision="fp32"),
        "magnitude": PruneMagnitude(),
    }.items():
        program = frontend.from_module(make_family("llama"))
        apply(program, NEURONS, step, DropDeadUnits(), data=rows)
        assert program.config["intermediate_size"] == 32
        scores = program.module(input_ids=rows[0]).logits[:, :-1].flatten(0, 1)
        found[name] = float(cross_entropy(scores, rows[0][:, 1:].flatten()).detach())
    assert found["elsa"] < 0.8 * found["magnitude"]
