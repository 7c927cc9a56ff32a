"""align: the same function, more of the weights kept, sizes that patterns divide."""

import copy
import itertools

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from elsa_compile import ElsaError, apply, export, facts, frontend, verify_export
from elsa_compile.passes import (
    Align,
    AllocateUniform,
    DropDeadUnits,
    PruneMagnitude,
    QuantizeWeights,
)
from elsa_compile.passes.alignment import deal, exchange, kept_energy
from elsa_compile.passes.unit_order import entries
from elsa_compile.patterns import NM, Block

DECODERS = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "opt", "neox")


def outputs(program, seed=1):
    """All outputs on random inputs."""
    torch.manual_seed(seed)
    leaves, spec = pytree.tree_flatten(program.signature.args)
    leaves = [torch.randn_like(x) if x.is_floating_point() else x for x in leaves]
    return pytree.tree_leaves(program.run(*pytree.tree_unflatten(leaves, spec)))


def assert_same(program, wanted):
    for one, other in zip(outputs(program), wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * max(1.0, float(other.abs().max())))


def uneven(model, seed=0):
    """Give the columns of every matrix sizes that differ, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = torch.randn(parameter.shape[1], generator=generator).exp()
                parameter.mul_(scale.reshape(1, -1, *[1] * (parameter.dim() - 2)))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def kept(program, pattern, sparsity=0.5):
    return {n: kept_energy(w.matrix(), pattern, sparsity) for n, w in program.prunable.items()}


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_a_model_keeps_more_and_computes_the_same(name, make_family, make_bert):
    program = frontend.from_module(uneven(make_bert() if name == "bert" else make_family(name)))
    wanted, before = outputs(program), kept(program, NM(2, 4))
    values = {n: w.parameter.flatten().sort().values for n, w in program.weights.items()}
    apply(program, Align(pattern="2:4"))
    stats = program.history[-1].stats
    assert stats.counts["reordered"] == 2
    assert stats.counts["kept_after"] > stats.counts["kept_before"]
    after = kept(program, NM(2, 4))
    gained = [n for n in after if after[n] > 1.001 * before[n]]
    assert len(gained) == 2, gained  # what reads the inner units of either layer
    assert all(after[n] > 0.9999 * before[n] for n in after)
    for each, weight in program.weights.items():
        assert torch.equal(weight.parameter.flatten().sort().values, values[each]), each
    assert_same(program, wanted)
    for fact in program.facts:
        facts.check(program, fact)
    text, state = program.to_text(), {n: w.parameter.clone() for n, w in program.weights.items()}
    apply(program, Align(pattern="2:4"))
    assert program.history[-1].stats.changed == 0
    assert program.to_text() == text
    assert all(torch.equal(w.parameter, state[n]) for n, w in program.weights.items())


def test_blocks_are_gathered(make_family):
    model, generator = make_family("llama"), torch.Generator().manual_seed(4)
    with torch.no_grad():  # neurons of different sizes
        for layer in model.model.layers:
            size = torch.randn(64, 1, generator=generator).exp()
            layer.mlp.gate_proj.weight.mul_(size)
            layer.mlp.up_proj.weight.mul_(size)
            layer.mlp.down_proj.weight.mul_(size.T)
    program = frontend.from_module(model)
    wanted, before = outputs(program), kept(program, Block(4, 4))
    apply(program, Align(pattern="4x4"))
    stats = program.history[-1].stats
    assert stats.counts["reordered"] == 2  # however often
    assert len(stats.notes) == len(set(stats.notes))
    after = kept(program, Block(4, 4))
    moved = [name for name in after if "mlp" in name]
    assert sum(after[n] for n in moved) > 1.03 * sum(before[n] for n in moved)
    assert_same(program, wanted)
    apply(program, Align(pattern="4x4"))
    assert program.history[-1].stats.changed == 0


class Odd(nn.Module):
    """Inner sizes that 4 does not divide: 6 channels through a flatten, then 10 and 9 neurons."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.one, self.two = nn.Linear(6 * 2 * 2, 10), nn.Linear(10, 9)
        self.head = nn.Linear(9, 5, bias=False)

    def forward(self, image):
        x = torch.relu(self.norm(self.conv(image)))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(torch.sigmoid(self.two(nn.functional.gelu(self.one(x)))))


@pytest.fixture
def odd():
    torch.manual_seed(0)
    model = Odd()
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6))
    return model.eval()


def test_what_does_not_divide_is_filled_up_and_drops_out_again(odd, tmp_path):
    program = frontend.from_module(odd, (torch.randn(2, 3, 6, 6),))
    wanted = outputs(program)
    ignore = ["conv.weight"]  # 3 x 3 x 3 inputs
    with pytest.raises(ElsaError, match=r"K=10, but pattern 2:4"):
        apply(program, AllocateUniform(pattern="2:4", targets=["re:.*weight"], ignore=ignore))
    apply(program, Align(pattern="2:4"))
    stats = program.history[-1].stats
    assert stats.counts["added_units"] == 2 + 3
    assert any("conv.weight has K=27" in note for note in stats.notes)
    shapes = {n: tuple(w.parameter.shape) for n, w in program.prunable.items()}
    assert shapes == {"conv.weight": (6, 3, 3, 3), "one.weight": (12, 24), "two.weight": (12, 12),
                      "head.weight": (5, 12)}  # fmt: skip
    assert (odd.two.in_features, odd.two.out_features, len(odd.two.bias)) == (12, 12, 12)
    assert not odd.head.weight[:, odd.two.weight.abs().sum(dim=1) == 0].any()
    assert_same(program, wanted)
    export.export(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    assert verify_export.check_logits(program, session).ok
    before = copy.deepcopy(shapes)
    apply(program, Align(pattern="2:4"))
    assert {n: tuple(w.parameter.shape) for n, w in program.prunable.items()} == before
    again = AllocateUniform(pattern="2:4", targets=["re:.*weight"], ignore=ignore)
    apply(program, again, PruneMagnitude())
    smaller = frontend.from_module(copy.deepcopy(odd), (torch.randn(2, 3, 6, 6),))
    apply(smaller, DropDeadUnits())
    assert smaller.history[-1].stats.counts["neurons"] >= 5


def test_channels_and_fused_layers_are_filled_up(odd, make_family):
    program = frontend.from_module(odd, (torch.randn(2, 3, 6, 6),))
    wanted = outputs(program)
    apply(program, Align(pattern="1x16", permute=False))
    shapes = {n: w.matrix_shape for n, w in program.prunable.items()}
    assert shapes == {"conv.weight": (8, 27), "one.weight": (16, 32), "two.weight": (16, 16),
                      "head.weight": (5, 16)}  # fmt: skip
    assert_same(program, wanted)
    program = frontend.from_module(make_family("phi3"))
    wanted = outputs(program)
    apply(program, Align(pattern="1x48", permute=False))  # of 64 neurons, gate and up in one
    assert program.history[-1].stats.counts["added_units"] == 2 * 32
    assert program.weights["model.layers.0.mlp.gate_up_proj.weight"].matrix_shape == (192, 32)
    assert program.config["intermediate_size"] == 96
    assert_same(program, wanted)


def test_a_plan_gives_the_pattern_and_what_is_pruned_stays(make_family):
    program = frontend.from_module(uneven(make_family("llama")))
    with pytest.raises(ElsaError, match="no weight has an N:M or block pattern; set align.pattern"):
        apply(program, AllocateUniform(), Align())
    only = ["re:.*down_proj.*"]
    apply(program, AllocateUniform(pattern="2:4", targets=only), Align(), PruneMagnitude())
    assert program.history[-2].stats.counts["reordered"] == 2
    share = [float((w.matrix() ** 2).sum()) for w, _ in program.planned()]
    values = {n: w.parameter.clone() for n, w in program.weights.items()}
    apply(program, Align())
    stats = program.history[-1].stats
    assert stats.changed == 0
    assert "pruned already; put align before that" in stats.notes[0]
    assert all(torch.equal(w.parameter, values[n]) for n, w in program.weights.items())
    assert share == [float((w.matrix() ** 2).sum()) for w, _ in program.planned()]


def test_a_grid_that_cannot_grow_is_left_and_said():
    """Scales of groups of 25 along 50 inputs: 52 would be no multiple of them."""
    torch.manual_seed(0)
    layers = nn.Linear(32, 50), nn.GELU(), nn.Linear(50, 90), nn.GELU(), nn.Linear(90, 8)
    program = frontend.from_module(nn.Sequential(*layers), (torch.randn(2, 32),))
    apply(program, QuantizeWeights(group_size=25, targets=["2.weight"]))
    wanted = outputs(program)
    apply(program, Align(pattern="4x2", permute=False))
    stats = program.history[-1].stats
    assert sum("2.weight is quantised in groups" in note for note in stats.notes) == 1
    assert any("0.weight is 50x32, which blocks of 4x2 do not tile" in n for n in stats.notes)
    shapes = [weight.matrix_shape for weight in program.prunable.values()]
    assert shapes == [(50, 32), (90, 50), (8, 90)]
    assert_same(program, wanted)


def test_patterns_without_groups_are_refused():
    with pytest.raises(ElsaError, match="pattern row fits any size and order; wanted N:M"):
        Align(pattern="row")


def test_exchanging_finds_the_best_order_of_a_small_matrix():
    torch.manual_seed(3)
    squares = (torch.randn(6, 6) * torch.randn(6).exp()).square()

    def energy(order):
        return float(squares[:, order].reshape(6, 2, 3).topk(1, dim=2).values.sum())

    start = deal(squares.sum(dim=0), 3)
    swaps = exchange(squares[:, start], 1, 3, 8, torch.Generator().manual_seed(0))
    order = start[swaps]
    assert sorted(order.tolist()) == list(range(6))
    every = [energy(torch.tensor(p)) for p in itertools.permutations(range(6))]
    assert energy(order) == pytest.approx(max(every))
    assert energy(order) > sum(every) / len(every)


def test_entries_of_a_unit_stay_in_their_order():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2]).numpy()
    moved = entries(labels, torch.tensor([2, 0, 1]).numpy())
    assert moved.tolist() == [4, 5, 0, 1, 2, 3, 8, 6, 7]
