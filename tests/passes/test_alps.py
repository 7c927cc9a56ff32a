"""ALPS: its pure functions on small matrices, against SparseGPT and against least squares."""

import pytest
import torch

import elsa_compile
from elsa_compile.passes import AllocateUniform, PruneALPS, PruneSparseGPT
from elsa_compile.passes.curvature import Inputs, curvature
from elsa_compile.passes.prune_alps import admm, alps, next_rho, solve_on_support
from elsa_compile.passes.prune_sparsegpt import sparsegpt
from elsa_compile.patterns import NM, Block, Unstructured


@pytest.fixture(scope="module")
def layer():
    """A weight (24, 32) and the mean x x^T of 1,000 correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator) * torch.logspace(0, -1.5, 32)[:, None]
    x = torch.randn(1000, 32, generator=generator) @ mixing
    return torch.randn(24, 32, generator=generator), x.t() @ x / 1000


def layer_error(values, weight, hessian):
    change = values - weight
    return float((change @ hessian * change).sum() / (weight @ hessian * weight).sum())


@pytest.mark.parametrize("sparsity", [0.7, 0.9])
@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured(per_row=True), Block(2, 4)])
def test_its_error_is_below_that_of_sparsegpt(layer, pattern, sparsity):
    weight, hessian = layer
    values, mask = alps(weight, curvature(hessian, 0.01), sparsity, pattern)
    other, wanted = sparsegpt(weight, hessian, sparsity, pattern)
    assert int(mask.sum()) == int(wanted.sum())
    assert pattern.violation(mask, sparsity) is None
    assert (values[~mask] == 0).all()
    assert layer_error(values, weight, hessian) < 0.7 * layer_error(other, weight, hessian)


@pytest.mark.parametrize("keep", [1, 2])
def test_n_of_m_too(layer, keep):
    weight, hessian = layer
    pattern, sparsity = NM(keep, 4), 1 - keep / 4
    values, mask = alps(weight, curvature(hessian, 0.01), sparsity, pattern)
    other, _ = sparsegpt(weight, hessian, sparsity, pattern)
    assert (mask.reshape(-1, 4).sum(dim=1) == keep).all()
    assert layer_error(values, weight, hessian) < 0.7 * layer_error(other, weight, hessian)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 0.995])
def test_the_count_is_exact(layer, sparsity):
    weight, hessian = layer
    _, mask = alps(weight, curvature(hessian, 0.01), sparsity, Unstructured())
    assert int((~mask).sum()) == round(sparsity * weight.numel())


def test_uncorrelated_inputs_keep_the_largest_weighted_magnitudes():
    """With a diagonal H the best support is known: the largest w^2 H_jj, values unchanged."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    power = torch.linspace(0.5, 4, 8)
    values, mask = alps(weight, curvature(torch.diag(power), 0.0), 0.5, Unstructured())
    assert torch.equal(mask, Unstructured().keep_mask(weight.square() * power, 0.5))
    assert torch.allclose(values, torch.where(mask, weight, 0), atol=1e-5)


def test_conjugate_gradients_find_the_least_squares_values(layer):
    weight, hessian = layer
    curve = curvature(hessian, 0.01)
    scaled = weight * curve.scale
    mask = Unstructured().keep_mask(scaled.square(), 0.6)
    wanted = scaled @ curve.matrix
    start = torch.where(mask, scaled, 0)
    values = solve_on_support(start, wanted, curve.matrix, mask, 200)
    for row in range(len(weight)):
        kept = mask[row]
        best = torch.linalg.solve(curve.matrix[kept][:, kept].double(), wanted[row, kept].double())
        assert torch.allclose(values[row, kept].double(), best, atol=2e-3)
    assert (values[~mask] == 0).all()


def test_each_conjugate_gradient_step_lowers_the_error(layer):
    weight, hessian = layer
    curve = curvature(hessian, 0.01)
    scaled = weight * curve.scale
    start, mask = admm(scaled, curve, 0.8, Unstructured(), 5)
    errors = [
        layer_error(
            solve_on_support(start, scaled @ curve.matrix, curve.matrix, mask, steps),
            scaled,
            curve.matrix,
        )
        for steps in range(8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_rho_grows_with_the_change_of_the_support():
    factors = [next_rho(1.0, changed, 1000, True) for changed in (0, 1, 5, 100, 900)]
    assert factors == [1.0, 1.1, 1.2, 1.3, 1.3]
    assert next_rho(1.0, 0, 1000, False) == 2.0


def test_the_decomposition_is_that_of_the_scaled_hessian(layer):
    _, hessian = layer
    curve = curvature(hessian, 0.1)
    assert torch.allclose(curve.matrix.diagonal(), torch.ones(32))
    rebuilt = curve.vectors @ torch.diag(curve.values) @ curve.vectors.t()
    assert torch.allclose(rebuilt, curve.matrix, atol=1e-5)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(32)
    assert torch.allclose(curve.matrix * curve.scale * curve.scale[:, None], damped, rtol=1e-4)


def test_inputs_that_are_always_zero_lose_their_weights():
    hessian = torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    values, _ = alps(torch.ones(2, 4), curvature(hessian, 0.01), 0.25, Unstructured(per_row=True))
    assert (values[:, 1] == 0).all()
    assert torch.isfinite(values).all()


def test_fewer_rows_than_inputs_are_enough():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, generator=generator)
    values, mask = alps(
        torch.randn(8, 16, generator=generator), curvature(x.t() @ x / 5, 0.0), 0.5, Unstructured()
    )
    assert torch.isfinite(values).all()
    assert int(mask.sum()) == 64


def test_moments_that_are_not_finite_are_said():
    with pytest.raises(elsa_compile.ElsaError, match="not finite; check the data"):
        curvature(torch.full((2, 2), float("nan")), 0.01)


def test_weights_with_the_same_inputs_share_one_decomposition():
    seen = Inputs(4, torch.device("cpu"))
    seen.add(torch.randn(10, 4))
    first = seen.curve(0.01)
    assert seen.curve(0.01) is first
    seen.add(torch.randn(10, 4))
    assert seen.curve(0.01) is not first


def test_the_output_of_a_model_errs_less_than_with_sparsegpt(make_family):
    import copy

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 300, (2, 32), generator=generator) for _ in range(16)]
    original = make_family("llama")
    errors = []
    for step in (PruneALPS(), PruneSparseGPT()):
        model = copy.deepcopy(original)
        elsa_compile.apply(model, AllocateUniform(sparsity=0.8), step, data=batches)
        with torch.no_grad():
            ids = torch.cat(batches)
            errors.append(float((model(ids).logits - original(ids).logits).norm()))
    assert errors[0] < errors[1]
