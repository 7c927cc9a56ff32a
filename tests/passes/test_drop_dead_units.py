"""drop-dead-units: smaller, and still the same function, in torch and in onnxruntime."""

import copy
from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from elsa_compile import apply, export, facts, frontend, genai, verify_export
from elsa_compile.channels import find_ties, members, units
from elsa_compile.facts import Fact
from elsa_compile.passes import (
    AllocateUniform,
    DropDeadUnits,
    PruneMagnitude,
    QuantizeWeights,
    drop_dead_units,
)

DECODERS = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "opt", "neox")


class Residual(nn.Module):
    """Two convolutions with BatchNorm add up; a third reads them, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.three = nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, image):
        x = torch.relu(self.norm_one(self.one(image)))
        x = torch.relu(x + self.norm_two(self.two(x)))
        x = torch.relu(self.three(self.depthwise(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    model = Residual()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    return model.eval()


def free_units(program):
    found = find_ties(program)
    return [(g, list(members(found, g))) for g in units(found) if g.pinned is None]


def kill(program, share=0.5, kinds=("neurons", "heads", "channels"), seed=0):
    """Zero the columns that read some units of each group; returns how many of each kind."""
    generator = torch.Generator().manual_seed(seed)
    killed = dict.fromkeys(kinds, 0)
    for group, matrices in free_units(program):
        if group.kind not in kinds:
            continue
        count = int(group.count * share)
        chosen = torch.randperm(group.count, generator=generator)[:count]
        killed[group.kind] += count
        for member in matrices:
            if member.axis == 1:
                weight = program.weights[member.weight]
                matrix = weight.matrix().clone()
                matrix[:, torch.isin(member.labels, chosen)] = 0
                weight.write(matrix)
    return killed


def outputs(program, seed=1):
    """The first output on random inputs with an empty or the example's cache."""
    torch.manual_seed(seed)
    leaves, spec = pytree.tree_flatten(program.signature.args)
    leaves = [torch.randn_like(x) if x.is_floating_point() else x for x in leaves]
    if program.kind == "decoder":
        leaves = leaves[:3] + [x[:, :, :0] for x in leaves[3:]]
        leaves[1] = leaves[1][:, : leaves[0].shape[1]]
        leaves[2] = torch.arange(leaves[0].shape[1]).expand_as(leaves[0])
    return pytree.tree_leaves(program.run(*pytree.tree_unflatten(leaves, spec)))[0]


def check_onnx(program, tmp_path):
    export.export(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    check = verify_export.check_logits(program, session)
    assert check.ok, check.detail
    assert check.difference < 2e-5
    return session


@pytest.mark.parametrize(("seed", "name"), enumerate(DECODERS))
def test_a_decoder_shrinks_and_computes_the_same(seed, name, make_family, tmp_path):
    program = frontend.from_module(make_family(name))
    killed = kill(program, seed=seed)
    assert min(killed["neurons"], killed["heads"]) > 0
    wanted, before = outputs(program), program.parameters()
    apply(program, DropDeadUnits())
    stats = program.history[-1].stats
    assert {kind: stats.counts[kind] for kind in killed} == killed
    assert stats.counts["parameters"] == before - program.parameters() > 0
    assert torch.allclose(outputs(program), wanted, atol=1e-5 * float(wanted.abs().max()))
    for fact in program.facts:
        facts.check(program, fact)
    session = check_onnx(program, tmp_path)
    heads = {s.shape[1] for s in session.get_inputs() if s.name.startswith("past")}
    config = genai.genai_config(program, "model.onnx")["model"]["decoder"]
    assert heads == {config["num_key_value_heads"]}
    assert config["head_size"] == 8
    assert config["num_attention_heads"] == 2
    text = program.to_text()
    apply(program, DropDeadUnits())
    assert program.history[-1].stats.changed == 0
    assert program.to_text() == text


def test_an_encoder_shrinks_and_computes_the_same(make_bert, tmp_path):
    program = frontend.from_module(make_bert())
    killed = kill(program)
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    assert program.history[-1].stats.changed == sum(killed.values()) == 2 * (32 + 2)
    assert torch.allclose(outputs(program), wanted, atol=1e-5)
    assert program.config["intermediate_size"] == 32
    check_onnx(program, tmp_path)


def test_channels_leave_through_batch_norm_residual_and_depthwise(residual, tmp_path):
    program = frontend.from_module(residual, (torch.randn(2, 3, 8, 8),))
    with torch.no_grad():  # channel 3 is read by nobody, channel 5 is zero after the residual
        residual.two.weight[:, 3] = 0
        residual.three.weight[:, [6, 7]] = 0
        for norm, conv in ((residual.norm_one, residual.one), (residual.norm_two, residual.two)):
            conv.weight[5] = norm.bias[5] = norm.running_mean[5] = 0
        residual.depthwise.bias.zero_()
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    assert residual.one.weight.shape == (6, 3, 3, 3)
    assert residual.two.weight.shape == (6, 6, 3, 3)
    assert residual.norm_two.running_var.shape == (6,)
    assert residual.depthwise.weight.shape == (12, 1, 3, 3)
    assert (residual.depthwise.groups, residual.depthwise.in_channels) == (6, 6)
    assert residual.three.in_channels == 12
    assert torch.allclose(outputs(program), wanted, atol=1e-5)
    check_onnx(program, tmp_path)


def test_the_result_is_the_model_made_of_the_remaining_weights(make_family):
    """Against a LLaMA built small, with the rows and columns copied by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make_family("llama")
    kept = torch.arange(64) % 2 == 0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[~kept] = 0
            layer.mlp.down_proj.weight[:, torch.arange(64) % 4 == 1] = 0
            layer.self_attn.o_proj.weight[:, :16] = 0  # both query heads of the first group
    options = model.config.to_dict() | {
        "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    small = LlamaForCausalLM(LlamaConfig(**options)).eval()
    state = copy.deepcopy(model.state_dict())
    for name, value in state.items():
        if "gate" in name or "up_proj" in name:
            state[name] = value[kept]
        elif "down" in name:
            state[name] = value[:, kept]
        elif "q_proj" in name:
            state[name] = value[16:]
        elif "k_proj" in name or "v_proj" in name:
            state[name] = value[8:]
        elif "o_proj" in name:
            state[name] = value[:, 16:]
    small.load_state_dict(state)
    program = frontend.from_module(model)
    apply(program, DropDeadUnits())
    for name, value in small.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, small(input_ids=ids).logits)
    for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert program.config[key] == getattr(model.config, key) == options[key]


def test_a_constant_neuron_moves_into_the_bias_of_its_reader(make_family):
    model = make_family("opt")
    layer = model.model.decoder.layers[0]
    with torch.no_grad():
        layer.fc1.weight[:4] = 0
        layer.fc1.bias[:4] = torch.tensor([1.0, 2.0, -3.0, 0.0])
    bias, columns = layer.fc2.bias.clone(), layer.fc2.weight[:, :4].clone()
    program = frontend.from_module(model)
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    assert layer.fc1.weight.shape == (60, 32)
    assert torch.allclose(layer.fc2.bias, bias + columns[:, 0] + 2 * columns[:, 1], atol=1e-6)
    assert torch.allclose(outputs(program), wanted, atol=1e-5)


def test_a_constant_without_a_bias_to_hold_it_stays():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.0
    program = frontend.from_module(model, (torch.randn(2, 6),))
    apply(program, DropDeadUnits())
    stats = program.history[-1].stats
    assert stats.changed == 0
    assert "2.weight has no bias to hold it" in " ".join(stats.notes)


def test_what_read_only_dead_units_goes_too_and_a_pt2_shrinks(tmp_path):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        model[4].weight[:, :3] = 0  # 3 neurons of the second layer
        model[2].weight[3:, :2] = 0  # 2 of the first are read by those alone
    batch = torch.export.Dim("rows")
    exported = torch.export.export(model, (torch.randn(2, 6),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "mlp.pt2")
    program = frontend.load(tmp_path / "mlp.pt2")
    assert program.module is None
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    shapes = {n: w.matrix_shape for n, w in program.prunable.items()}
    assert shapes == {"0.weight": (6, 6), "2.weight": (5, 6), "4.weight": (3, 5)}
    assert torch.allclose(outputs(program), wanted, atol=1e-6)
    check_onnx(program, tmp_path)


def test_layers_keep_equal_head_counts_and_the_rest_is_said(make_family):
    model = make_family("gpt2")
    with torch.no_grad():  # stored (K, N): rows are what c_proj reads
        model.transformer.h[0].attn.c_proj.weight[:24] = 0
        model.transformer.h[1].attn.c_proj.weight[8:16] = 0
    program = frontend.from_module(model)
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    stats = program.history[-1].stats
    assert stats.counts["heads"] == 2
    assert "h.0.attn.c_proj.weight: 2 dead heads, since another layer keeps 3" in stats.notes[0]
    assert {x.shape[1] for x in program.signature.args[3]} == {3}
    assert torch.allclose(outputs(program), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_query_head_whose_group_lives_stays(make_family):
    model = make_family("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :8] = 0
    program = frontend.from_module(model)
    apply(program, DropDeadUnits())
    assert program.history[-1].stats.changed == 0


def test_one_unit_of_an_entirely_dead_layer_stays(make_family):
    model = make_family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    program = frontend.from_module(model)
    apply(program, DropDeadUnits())
    assert model.model.layers[0].mlp.up_proj.weight.shape == (1, 32)
    assert "all 64 units are dead, one stays" in program.history[-1].stats.notes[0]
    assert program.config["intermediate_size"] == 64
    assert program.config["elsa_intermediate_sizes"] == [1, 64]


def test_masks_shrink_with_their_weights_and_stay_kept(make_family):
    program = frontend.from_module(make_family("llama"))
    kill(program)
    apply(program, AllocateUniform(sparsity=0.7), PruneMagnitude())
    zeros = sum(int((w.parameter != 0).sum()) for w in program.weights.values())
    apply(program, DropDeadUnits())
    assert program.history[-1].stats.counts["neurons"] >= 64
    for weight, plan in program.planned():
        assert plan.mask.shape == plan.shape == weight.matrix_shape
        assert plan.sparsity <= 0.7
        assert not weight.matrix()[~plan.mask].any()
    # Rows of the pruned units left with values in them, so fewer are non-zero, never more.
    assert sum(int((w.parameter != 0).sum()) for w in program.weights.values()) <= zeros


def test_a_pattern_that_would_break_keeps_the_units(make_family):
    program = frontend.from_module(make_family("llama"))
    model = program.module
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, [1, 6]] = 0
    apply(program, AllocateUniform(pattern="2:4"), PruneMagnitude(), DropDeadUnits())
    stats = program.history[-1].stats
    assert stats.changed == 0
    assert "needs a multiple of 4" in stats.notes[0]
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 64)


class Leaky(nn.Module):
    """An activation written as a choice, or in place though its argument was read before."""

    def __init__(self, in_place):
        super().__init__()
        self.one, self.two, self.early = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.in_place = in_place

    def forward(self, x):
        hidden = self.one(x)
        early = self.early(hidden)
        if self.in_place:
            return self.two(torch.relu_(hidden)) + early
        return self.two(torch.where(hidden > 0, hidden, 0.1 * hidden)) + early


@pytest.mark.parametrize("in_place", [True, False])
def test_constants_survive_activations_of_every_kind(in_place):
    torch.manual_seed(0)
    model = Leaky(in_place).eval()
    with torch.no_grad():
        model.one.weight[:2] = 0
        model.one.bias[:2] = torch.tensor([1.0, -1.0])
        model.two.weight[:, :3] = 0
        model.early.weight[:, 2] = 0
    program = frontend.from_module(model, (torch.randn(2, 6),))
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    assert model.one.out_features == 5  # the first two go into the bias of `early`
    assert torch.allclose(outputs(program), wanted, atol=1e-6)


def test_one_layer_that_cannot_lose_heads_keeps_those_of_all(make_family, monkeypatch):
    program = frontend.from_module(make_family("llama"))
    kill(program, kinds=("heads",))
    real = drop_dead_units.units

    def pinned(found):
        groups = real(found)
        heads = [g for g in groups if g.kind == "heads"]
        fixed = replace(heads[0], pinned="for this test")
        return [fixed if g is heads[0] else g for g in groups]

    monkeypatch.setattr(drop_dead_units, "units", pinned)
    apply(program, DropDeadUnits())
    assert program.history[-1].stats.counts["heads"] == 0
    assert "since another layer keeps 2" in program.history[-1].stats.notes[0]


class Stubborn(nn.Module):
    """Says its own width where no pass can know it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.one(x)
        if hidden.shape[-1] != 8:
            raise RuntimeError("wanted 8")
        return self.two(hidden.relu())


def test_a_module_that_cannot_follow_is_left_as_it_was():
    torch.manual_seed(0)
    model = Stubborn().eval()
    with torch.no_grad():
        model.two.weight[:, 2] = 0
    program = frontend.from_module(model, (torch.randn(2, 6),))
    state, text = copy.deepcopy(model.state_dict()), program.to_text()
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    assert "does not run: wanted 8" in program.history[-1].stats.notes[0]
    assert program.history[-1].stats.changed == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.one.out_features == 8
    assert program.to_text() == text
    assert torch.equal(outputs(program), wanted)


def test_quantised_weights_stay_on_their_grids(make_family):
    program = frontend.from_module(make_family("opt"))
    kill(program)
    apply(program, QuantizeWeights())
    wanted = outputs(program)
    apply(program, DropDeadUnits())
    assert program.history[-1].stats.counts["neurons"] == 64
    facts.check(program, Fact.QUANTIZED)
    grids = program.grids()
    assert grids
    for name, grid in grids.items():
        assert grid.scale.shape[0] == program.weights[name].matrix_shape[0]
    assert torch.allclose(outputs(program), wanted, atol=1e-5 * float(wanted.abs().max()))
