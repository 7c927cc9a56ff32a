"""The pure functions of the pruning passes, on matrices small enough to check by hand."""

import pytest
import torch

import elsa_compile
from elsa_compile.passes import AllocateUniform, PruneMagnitude, PruneSparseGPT, PruneWanda
from elsa_compile.passes.prune_sparsegpt import Hessian, inverse_factor, sparsegpt
from elsa_compile.passes.prune_wanda import wanda_mask
from elsa_compile.patterns import NM, Block, Unstructured, parse_pattern


@pytest.fixture
def weight():
    return torch.tensor([[1.0, -5.0, 2.0, 8.0], [-3.0, 4.0, 7.0, -6.0]])


def test_unstructured_keeps_the_largest_of_all(weight):
    mask = Unstructured().keep_mask(weight.abs(), 0.5)
    assert mask.tolist() == [[False, True, False, True], [False, False, True, True]]


def test_per_row_keeps_the_largest_of_each_row(weight):
    mask = Unstructured(per_row=True).keep_mask(weight.abs(), 0.75)
    assert mask.tolist() == [[False, False, False, True], [False, False, True, False]]


def test_n_of_m_keeps_the_largest_of_each_group(weight):
    mask = NM(1, 2).keep_mask(weight.abs(), 0.5)
    assert mask.tolist() == [[False, True, False, True], [False, True, True, False]]


def test_blocks_go_or_stay_together(weight):
    mask = Block(2, 2).keep_mask(weight.abs(), 0.5)
    assert mask.tolist() == [[False, False, True, True], [False, False, True, True]]


def test_equal_magnitudes_are_cut_at_the_exact_count():
    mask = Unstructured().keep_mask(torch.ones(10, 10), 0.37)
    assert int(mask.sum()) == 63


@pytest.mark.parametrize("text", ["unstructured", "row", "2:4", "4x4"])
def test_patterns_read_back_what_they_write(text):
    assert str(parse_pattern(text)) == text


def test_wanda_weighs_by_the_norm_of_the_input(weight):
    # Norms 1, 1, 10, 0: the last column matters least, however large its weights.
    mask = wanda_mask(weight, torch.tensor([1.0, 1.0, 100.0, 0.0]), 0.5, Unstructured(per_row=True))
    assert mask.tolist() == [[False, True, True, False], [False, True, True, False]]


def test_the_factor_is_that_of_the_inverse():
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = (x.t() @ x / 50).float()
    factor = inverse_factor(hessian, 0.0).double()
    assert torch.allclose(factor.t() @ factor, torch.linalg.inv(hessian.double()), rtol=1e-3)
    assert torch.equal(factor, factor.triu())


def test_a_matrix_without_full_rank_is_damped():
    x = torch.randn(2, 6)
    assert torch.isfinite(inverse_factor(x.t() @ x, 0.01)).all()
    with pytest.raises(elsa_compile.ElsaError, match="damping"):
        inverse_factor(-torch.eye(3), 0.0)


def test_one_weight_removed_is_compensated_optimally():
    """Removing column 0 leaves the least-squares solution over the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator) @ torch.randn(3, 3, generator=generator)
    w = torch.tensor([[0.01, 1.0, -2.0]])  # column 0 is the one to go
    hessian = x.t() @ x / 200
    values, mask = sparsegpt(w, hessian, 1 / 3, Unstructured(), damping=0.0)
    assert mask.tolist() == [[False, True, True]]
    target = x @ w.t()
    best = torch.linalg.lstsq(x[:, 1:], target).solution.t()
    assert torch.allclose(values[:, 1:], best, atol=1e-3)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured(per_row=True), NM(2, 4)])
def test_sparsegpt_errs_less_than_magnitude(pattern):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=generator)
    x = torch.randn(300, 32, generator=generator) @ mixing
    w = torch.randn(16, 32, generator=generator)
    seen = Hessian(32, torch.device("cpu"))
    for rows in x.split(100):
        seen.add(rows)
    assert torch.allclose(seen.total, x.t() @ x / 300, rtol=1e-4, atol=1e-4)
    values, mask = sparsegpt(w, seen.total, 0.5, pattern)
    magnitude = torch.where(pattern.keep_mask(w.abs(), 0.5), w, 0)
    assert int(mask.sum()) == w.numel() // 2
    assert torch.equal(values != 0, mask)
    error = (x @ (values - w).t()).norm()
    assert error < (x @ (magnitude - w).t()).norm()


def test_blocks_of_columns_give_the_exact_count():
    w = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    _, mask = sparsegpt(w, torch.eye(50), 0.33, Unstructured(), block_size=16)
    assert int((~mask).sum()) == round(0.33 * 350)


def test_inputs_that_are_always_zero_lose_their_weights():
    w = torch.ones(2, 4)
    hessian = torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    values, _ = sparsegpt(w, hessian, 0.25, Unstructured(per_row=True))
    assert (values[:, 1] == 0).all()


# --- The passes on a model --------------------------------------------------------------------


def error_of(step, make_family, make_batches):
    """Output error of a pruned model against the original, on the data."""
    import copy

    model = make_family("llama")
    original = copy.deepcopy(model)
    elsa_compile.apply(model, AllocateUniform(sparsity=0.5), step, data=make_batches)
    with torch.no_grad():
        ids = torch.cat(make_batches)
        return float((model(ids).logits - original(ids).logits).norm())


def test_data_helps(make_family):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 300, (2, 32), generator=generator) for _ in range(16)]
    magnitude = error_of(PruneMagnitude(), make_family, batches)
    second_order = error_of(PruneSparseGPT(), make_family, batches)
    assert second_order < magnitude


def test_the_inputs_of_a_layer_are_those_of_the_pruned_model(make_family):
    """Wanda's last matrix equals the mask from activations of the model pruned so far."""
    model = make_family("llama")
    reference = make_family("llama")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 300, (2, 32), generator=generator) for _ in range(4)]
    program = elsa_compile.apply(
        model, AllocateUniform(sparsity=0.5, pattern="row"), PruneWanda(), data=batches
    )
    name = "model.layers.1.mlp.down_proj.weight"
    # Everything before the last matrix as the pass left it, the last one still dense.
    state = model.state_dict()
    state[name] = reference.state_dict()[name]
    reference.load_state_dict(state)
    seen = []
    owner = reference.model.layers[1].mlp.down_proj
    owner.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, 64)))
    with torch.no_grad():
        for batch in batches:
            reference(batch)
        rows = torch.cat(seen)
        wanted = wanda_mask(owner.weight, rows.square().sum(dim=0), 0.5, Unstructured(per_row=True))
    assert torch.equal(program.plans[name].mask, wanted)


def test_convolutions_are_pruned_with_data(cnn):
    images = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    program = elsa_compile.apply(
        cnn, AllocateUniform(sparsity=0.5), PruneSparseGPT(), data=images,
        example_inputs=(images[0],),
    )  # fmt: skip
    for weight, _ in program.planned():
        assert float((weight.parameter == 0).float().mean()) == pytest.approx(0.5, abs=0.06)


def test_targets_and_ignore_choose_weights(make_family):
    model = make_family("llama")
    step = AllocateUniform(sparsity=0.5, targets=["re:.*mlp.*"], ignore=["re:.*layers\\.0.*"])
    program = elsa_compile.apply(model, step, PruneMagnitude())
    planned = [weight.name for weight, _ in program.planned()]
    assert planned == [
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    ]  # fmt: skip
    assert program.plans["model.layers.0.mlp.up_proj.weight"].skipped == "listed in ignore"


def test_an_entry_that_matches_nothing_is_an_error(make_family):
    with pytest.raises(elsa_compile.ElsaError, match="matches no weight"):
        elsa_compile.apply(make_family("llama"), AllocateUniform(ignore=["re:.*mpl.*"]))
