"""Our Adam against torch's, and its one-byte moments."""

import pytest
import torch
from torch import nn

from elsa_compile.errors import UserInputError
from elsa_compile.passes.adam import (
    Adam,
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
)
from elsa_compile.runtime import kernels


def problem(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)), torch.randn(32, 64)


def train(model, x, step, count=60):
    losses = []
    for _ in range(count):
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        step()
        for parameter in model.parameters():
            parameter.grad = None
        losses.append(float(loss.detach()))
    return losses


def test_float_states_step_exactly_as_torch_does():
    ours, x = problem()
    theirs, _ = problem()
    adam = Adam(ours.named_parameters())
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-3, fused=True)
    assert train(ours, x, lambda: adam.step(1e-3)) == train(theirs, x, reference.step)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(adam.second_moment(name), reference.state[other]["exp_avg_sq"])


def test_byte_states_train_as_well():
    ours, x = problem()
    theirs, _ = problem()
    adam = Adam(ours.named_parameters(), states="int8")
    reference = torch.optim.Adam(theirs.parameters(), lr=3e-3)
    small = train(ours, x, lambda: adam.step(3e-3), 300)[-1]
    full = train(theirs, x, reference.step, 300)[-1]
    assert small < 1.1 * full + 1e-4
    for name, parameter in ours.named_parameters():
        moment = adam.second_moment(name)
        assert moment.shape == parameter.shape
        assert bool((moment >= 0).all())


def test_byte_states_take_two_bytes():
    parameter = nn.Parameter(torch.zeros(512, 512))
    adam = Adam([("w", parameter)], states="int8")
    assert adam.state_bytes() / parameter.numel() == pytest.approx(2.03125)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_codes_keep_relative_precision(scale):
    torch.manual_seed(1)
    half = torch.full((8, 256), 0.5)
    values = torch.randn(8, 256) * scale
    back = decode_signed(*encode_signed(values, half))
    top = values.abs().amax(dim=1, keepdim=True)
    # A step of the code c moves (c / 127)^2 by 2 c / 127^2: half of it at most, plus curvature.
    bound = top * ((values.abs() / top).sqrt() / 127 + 1 / (4 * 127**2)) * 1.001
    assert bool(((back - values).abs() <= bound).all())
    positive = values.square()
    back = decode_positive(*encode_positive(positive, half))
    large = positive > positive.amax(dim=1, keepdim=True) * 1e-4
    assert float(((back - positive).abs() / positive)[large].max()) < 0.09


def test_stochastic_rounding_has_no_bias():
    """An average that shrinks by 0.1 % a step must shrink, not stick to its code."""
    torch.manual_seed(0)
    codes, scale = encode_positive(
        torch.full((64, 256), 0.5).fill_diagonal_(1.0), torch.rand(64, 256)
    )
    start = decode_positive(codes, scale).mean()
    for _ in range(500):
        value = decode_positive(codes, scale) * 0.999
        codes, scale = encode_positive(value, torch.rand(64, 256))
    ratio = float(decode_positive(codes, scale).mean() / start)
    assert ratio == pytest.approx(0.999**500, rel=0.05)


def test_a_positive_moment_never_becomes_zero():
    values = torch.full((1, 256), 1e-30)
    values[0, 0] = 1.0
    assert bool((decode_positive(*encode_positive(values, torch.zeros(1, 256))) > 0).all())


def test_all_zero_blocks_stay_zero():
    zeros = torch.zeros(2, 256)
    assert not decode_signed(*encode_signed(zeros, zeros)).any()
    assert not decode_positive(*encode_positive(zeros, zeros)).any()


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_state_comes_back_bit_for_bit(states):
    first, x = problem()
    adam = Adam(first.named_parameters(), states=states, seed=3)
    train(first, x, lambda: adam.step(1e-3), 5)
    kept = {k: v.clone() for k, v in adam.state().items()}
    weights = {k: v.clone() for k, v in first.state_dict().items()}
    train(first, x, lambda: adam.step(1e-3), 5)
    second, _ = problem(1)
    second.load_state_dict(weights)
    again = Adam(second.named_parameters(), states=states, seed=3)
    again.load_state(kept, 5)
    train(second, x, lambda: again.step(1e-3), 5)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sizes_that_are_no_multiple_of_a_block():
    parameter = nn.Parameter(torch.randn(67, 91))
    adam = Adam([("w", parameter)], states="int8")
    before = parameter.detach().clone()
    parameter.grad = torch.randn_like(parameter)
    adam.step(0.01)
    moved = (parameter.detach() - before).abs()
    # The first step of Adam has size lr, whatever the gradient.
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=0.01, atol=0)


def test_many_sizes_share_chunks(monkeypatch):
    """Small tensors lie in one chunk, a large one in several; the result is that of each alone."""
    monkeypatch.setattr("elsa_compile.passes.adam.CHUNK", 1 << 13)
    torch.manual_seed(0)
    sizes = [(64, 64), (5000,), (130, 170), (4096,), (70, 99)]
    together = {f"p{i}": nn.Parameter(torch.randn(size)) for i, size in enumerate(sizes)}
    alone = {name: nn.Parameter(p.detach().clone()) for name, p in together.items()}
    shared = Adam(together.items(), states="int8")
    single = {name: Adam([(name, p)], states="int8") for name, p in alone.items()}
    for _ in range(4):
        for name, parameter in together.items():
            parameter.grad = torch.randn_like(parameter)
            alone[name].grad = parameter.grad.clone()
        shared.step(1e-2)
        for adam in single.values():
            adam.step(1e-2)
    for name, parameter in together.items():
        # The dither differs, so codes may differ by one: 2 / 127 of the largest m in a block.
        assert float((parameter - alone[name]).abs().max()) < 5e-3
        a, b = shared.second_moment(name), single[name].second_moment(name)
        assert a.shape == parameter.shape
        torch.testing.assert_close(a.mean(), b.mean(), rtol=0.02, atol=0)


def stepped(seed=0, count=3, gradient=1.0):
    """Codes, scales and weights after some steps with one-byte moments."""
    torch.manual_seed(seed)
    parameters = {"a": nn.Parameter(torch.randn(67, 91)), "b": nn.Parameter(torch.randn(4096, 3))}
    adam = Adam(parameters.items(), states="int8", seed=seed)
    for _ in range(count):
        for parameter in parameters.values():
            size = torch.randn_like(parameter).mul_(3).exp_()  # over many decades, as gradients are
            parameter.grad = torch.randn_like(parameter) * size * gradient
        adam.step(1e-2)
    return {n: p.detach() for n, p in parameters.items()}, {
        n: t.clone() for n, t in adam.state().items()
    }


needs_kernels = pytest.mark.skipif(not kernels.available()[0], reason=kernels.available()[1])


@needs_kernels
@pytest.mark.parametrize("gradient", [1.0, 1e-20, 0.0])
def test_the_native_step_is_that_of_the_tensors(monkeypatch, gradient):
    for count in (1, 4):
        weights, state = stepped(count=count, gradient=gradient)
        monkeypatch.setattr(Adam, "_runs_natively", lambda self, names: False)
        wanted, reference = stepped(count=count, gradient=gradient)
        monkeypatch.undo()
        for name, tensor in state.items():
            if name.endswith("scale"):
                torch.testing.assert_close(tensor, reference[name], rtol=1e-2, atol=0)
                continue
            # Sums in another order round some codes to a neighbour, and one code's difference
            # goes on in later steps.
            off = (tensor.int() - reference[name].int()).abs()
            assert int(off.max()) <= (1 if count == 1 else 3)
            assert float((off > 0).float().mean()) < (1e-3 if count == 1 else 2e-2)
        for name, tensor in weights.items():
            off = (tensor - wanted[name]).abs()
            assert float(off.max()) < (1e-6 if count == 1 else 1e-3)
            assert float(off.mean()) < 1e-5


@needs_kernels
def test_every_instruction_set_steps_to_the_same_bits(monkeypatch):
    names = ("portable", "avx2", "avx512", "avx512vnni")
    monkeypatch.delenv(kernels.ISA_ENVIRONMENT, raising=False)
    found = []
    for name in names[: names.index(kernels.isa()) + 1]:
        monkeypatch.setenv(kernels.ISA_ENVIRONMENT, name)
        weights, state = stepped()
        found.append({**weights, **state})
    for other in found[1:]:
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


@needs_kernels
def test_threads_step_to_the_same_bits(monkeypatch):
    monkeypatch.setattr("elsa_compile.passes.adam.CHUNK", 1 << 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = stepped()
        torch.set_num_threads(3)
        shared = stepped()
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@needs_kernels
def test_an_unknown_instruction_set_is_said(monkeypatch):
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, "sse9")
    with pytest.raises(UserInputError, match="ELSA_ISA is 'sse9'"):
        stepped()
