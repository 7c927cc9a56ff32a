"""How the ADMM state of a weight is stored in float32, bfloat16 and float8."""

import pytest
import torch

from elsa_compile.passes.admm_constraint import Store, rounding_noise


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_the_state_is_stored_by_blocks(kind):
    torch.manual_seed(0)
    target = torch.randn(13, 37) * torch.logspace(-4, 2, 37)
    target[0] = 0
    store = Store(kind)
    store.write(target, noise(kind))
    assert bool((store.read()[0] == 0).all())
    error = (store.read() - target).abs() / target.abs().clamp_min(1e-30)
    assert float(error.max()) <= {"fp32": 0.0, "bf16": 2**-7, "fp8": 1.0}[kind]
    large = target.abs() > 0.01 * target.abs().max()
    assert float(error[large].max()) <= {"fp32": 0.0, "bf16": 2**-7, "fp8": 2**-3}[kind]


def noise(kind, step=0):
    return rounding_noise(kind, 0, step, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("value", [1.003, -0.3, 5e-3])
def test_a_stored_state_is_right_on_average(kind, value):
    target = torch.full((64, 256), value)
    target[:, 0] = 7.0  # sets the scale of a block
    store = Store(kind)
    store.write(target, noise(kind))
    step = abs(value) * {"bf16": 2**-7, "fp8": 2**-3}[kind]
    assert abs(float(store.read()[:, 1:].mean()) - value) < 0.03 * step


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_kept_weights_learn_in_steps_below_those_of_the_grid(kind):
    """What is stored of a kept weight draws it; nearest numbers would never let it go."""
    w, exact, store = torch.full((64, 256), 1.0), 1.0, Store(kind)
    w[:, 0] = 7.0  # sets the scale of a block
    t = exact
    for step in range(100):
        store.write(w, noise(kind, step))
        t = exact
        w = (w + 1e-4).lerp_(store.read(), 0.8)
        exact = (exact + 1e-4) * 0.2 + 0.8 * t
    assert exact - 1.0 > 1.9e-3  # a quarter of a step of bfloat16
    assert float(w[:, 1:].mean()) - 1.0 == pytest.approx(exact - 1.0, rel=0.2)
