"""Low-bit grids: the maths against brute force and least squares, the pass on models."""

import copy

import pytest
import torch

import elsa_compile
from elsa_compile import frontend
from elsa_compile.data import run_row
from elsa_compile.facts import Fact, FactError, check
from elsa_compile.passes import AllocateUniform, FinetuneMasked, PruneMagnitude, QuantizeWeights
from elsa_compile.passes.prune_sparsegpt import Hessian
from elsa_compile.passes.quantisation import (
    compensate,
    fit_scale,
    from_integers,
    output_error,
    project,
    to_integers,
)


def matrix(rows=12, columns=64, seed=0, sparsity=0.5):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) >= sparsity
    return torch.where(mask, values, 0.0), mask


def correlated_inputs(columns, rows=600, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns // 4, generator=generator)
    latent = torch.randn(rows, columns // 4, generator=generator)
    return latent @ mixing.t() + 0.3 * torch.randn(rows, columns, generator=generator)


def hessian_of(rows):
    seen = Hessian(rows.shape[1], torch.device("cpu"))
    seen.add(rows)
    return seen.total


# --- Grids --------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("group_size", [None, 16])
def test_values_are_whole_multiples_and_zero_is_zero(bits, most, group_size):
    values, _ = matrix()
    found, scale = project(values, bits, group_size)
    assert scale.shape == (12, 1 if group_size is None else 4)
    steps = found.reshape(12, scale.shape[1], -1) / scale[:, :, None]
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.abs().max() < most + 0.5
    assert (found[values == 0] == 0).all()
    assert not torch.signbit(found[values == 0]).any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_scale_is_as_good_as_the_best_of_a_fine_search(bits, heavy):
    # Long rows: in short ones a scale can be lucky with a few entries.
    values, _ = matrix(rows=6, columns=2048)
    values = values**3 if heavy else values
    scale = fit_scale(values, bits)
    most = (1 << (bits - 1)) - 1
    best = torch.full((6,), float("inf"), dtype=torch.float64)
    for candidate in torch.linspace(0.2, 1.05, 2000, dtype=torch.float64):
        step = (candidate * values.double().abs().amax(dim=1) / most)[:, None]
        error = (values.double() / step).round().clamp(-most, most) * step - values.double()
        best = torch.minimum(best, error.square().sum(dim=1))
    found = from_integers(to_integers(values, scale, bits), scale).double() - values.double()
    assert (found.square().sum(dim=1) <= 1.06 * best).all()


def test_clipping_beats_the_largest_entry_at_four_bits():
    values, _ = matrix(rows=64)
    plain = values.abs().amax(dim=1, keepdim=True) / 7
    clipped, _ = project(values, 4)
    rounded = from_integers(to_integers(values, plain, 4), plain)
    assert (clipped - values).norm() < 0.95 * (rounded - values).norm()


def test_importance_moves_the_scale_to_what_matters():
    values, _ = matrix(rows=8, sparsity=0.0)
    importance = torch.where(values.abs() > 1.5, 1.0, 1e-3)

    def error(scale):
        lost = from_integers(to_integers(values, scale, 4), scale) - values
        return (importance * lost.square()).sum(dim=1)

    assert (error(fit_scale(values, 4, importance=importance)) <= error(fit_scale(values, 4))).all()
    assert (
        error(fit_scale(values, 4, importance=importance)).sum() < error(fit_scale(values, 4)).sum()
    )


def test_all_zero_and_subnormal_groups_stay_finite():
    values = torch.zeros(3, 8)
    values[1] = 1e-42
    values[2, 0] = 5.0
    found, scale = project(values, 8, 4)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.isfinite(found).all()
    assert found[0].count_nonzero() == 0
    assert found[2, 0] == pytest.approx(5.0, rel=1e-6)


def test_the_projection_obeys_the_mask_and_is_the_nearest_level():
    values, _ = matrix(sparsity=0.0)
    _, mask = matrix(seed=3)
    found, scale = project(values, 4, 16, mask)
    assert found[~mask].count_nonzero() == 0
    levels = torch.arange(-7, 8).float()
    wide = scale.repeat_interleave(16, dim=1)[:, :, None] * levels
    nearest = (wide - values[:, :, None]).abs().amin(dim=2)
    assert torch.allclose((found - values).abs()[mask], nearest[mask], atol=1e-6)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="K=30 is no multiple of group_size 16"):
        fit_scale(torch.ones(2, 30), 4, 16)


# --- Compensation -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
def test_compensation_lowers_the_output_error_and_keeps_every_zero(bits, group_size):
    values, mask = matrix(rows=32)
    rows = correlated_inputs(64)
    scale = fit_scale(values, bits, group_size)
    plain = from_integers(to_integers(values, scale, bits), scale)
    found = compensate(values, hessian_of(rows), scale, bits, mask)
    # Measured on the outputs themselves, in float64.
    wanted = rows.double() @ values.double().t()
    before = (rows.double() @ plain.double().t() - wanted).square().sum(dim=0)
    after = (rows.double() @ found.double().t() - wanted).square().sum(dim=0)
    assert after.sum() < 0.7 * before.sum()
    assert (after <= before * 1.001).all()
    assert found[~mask].count_nonzero() == 0
    assert torch.equal(from_integers(to_integers(found, scale, bits), scale), found)


def test_one_sweep_takes_the_best_level_of_each_entry_in_turn():
    values, mask = matrix(rows=3, columns=8)
    hessian = hessian_of(correlated_inputs(8))
    scale = fit_scale(values, 4)
    found = compensate(values, hessian, scale, 4, mask, sweeps=1, damping=0.0)
    for row in range(3):
        now = from_integers(to_integers(values, scale, 4), scale)[row].double()
        for column in range(8):
            if not mask[row, column]:
                continue
            trials = []
            for level in range(-7, 8):
                trial = now.clone()
                trial[column] = level * float(scale[row])
                lost = trial - values[row].double()
                trials.append((float(lost @ hessian.double() @ lost), level))
            now[column] = min(trials)[1] * float(scale[row])
        assert torch.allclose(found[row].double(), now, atol=1e-6)


def test_inputs_that_are_always_zero_are_rounded_plainly():
    values, mask = matrix(rows=4, columns=16)
    rows = correlated_inputs(16)
    rows[:, 5] = 0
    scale = fit_scale(values, 8)
    found = compensate(values, hessian_of(rows), scale, 8, mask, damping=0.0)
    plain = from_integers(to_integers(values, scale, 8), scale)
    assert torch.isfinite(found).all()
    assert torch.allclose(found[:, 5], plain[:, 5])


def test_the_output_error_is_that_of_the_outputs():
    values, _ = matrix(rows=5, columns=8)
    rows = correlated_inputs(8)
    wanted = (rows @ values.t()).square().mean(dim=0)
    assert torch.allclose(output_error(values, hessian_of(rows)), wanted, rtol=1e-4)


# --- The pass -----------------------------------------------------------------------------


@pytest.fixture
def load(make_family):
    """Family -> a fresh program of it."""
    models = {}

    def build(name):
        models.setdefault(name, make_family(name))
        return frontend.from_module(copy.deepcopy(models[name]))

    return build


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (2, 24), generator=generator) for _ in range(6)]


def pruned(program, **options):
    step = QuantizeWeights(**options)
    elsa_compile.apply(
        program, AllocateUniform(sparsity=0.6), PruneMagnitude(), step, data=batches()
    )
    return program


@pytest.mark.parametrize("method", ["rtn", "compensated"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_every_pruned_entry_stays_zero_and_every_kind_has_its_rule(load, family, method):
    program = pruned(load(family), bits="int4", group_size=16, method=method)
    assert {Fact.QUANTIZED, Fact.MASKED, Fact.PLANNED} <= program.facts
    grids = program.grids()
    for weight, plan in program.planned():
        assert weight.matrix()[~plan.mask].count_nonzero() == 0
        assert grids[weight.name].bits == 4
        assert grids[weight.name].group_size(weight.matrix_shape[1]) == 16
    for weight in program.weights.values():
        if weight.kind == "embedding" or weight.is_head:
            assert grids[weight.name].bits == 8
            assert grids[weight.name].scale.shape == (weight.matrix_shape[0], 1)
    assert {weight.name for weight, _ in program.planned()} <= set(program.prunable)


def test_compensation_beats_rounding_on_the_layers_of_a_model(load):
    errors = {}
    for method in ("rtn", "compensated"):
        program, original = load("llama"), load("llama")
        elsa_compile.apply(
            program, QuantizeWeights(bits="int4", method=method, head="none", embedding="none"),
            data=batches(),
        )  # fmt: skip
        rows = [{"input_ids": ids} for ids in batches()]
        pairs = [(run_row(program, row)[0], run_row(original, row)[0]) for row in rows]
        errors[method] = sum(float((a - b).square().sum()) for a, b in pairs)
    assert errors["compensated"] < 0.9 * errors["rtn"]


def test_convolutions_have_a_scale_a_channel_and_small_weights_are_left(cnn):
    layers = torch.nn.Conv2d(3, 16, 3), torch.nn.Flatten(), torch.nn.Linear(64, 4)
    wide = torch.nn.Sequential(*layers, torch.nn.Linear(4, 4))
    example = (torch.randn(2, 3, 4, 4),)
    done = elsa_compile.apply(wide, QuantizeWeights(group_size=16), example_inputs=example)
    assert done.grids()["0.weight"].scale.shape == (16, 1)
    assert done.grids()["2.weight"].scale.shape == (4, 4)
    assert "3.weight" not in done.grids()
    assert "3.weight left in float: smaller than 1024 bytes" in done.history[-1].stats.notes
    example = (torch.randn(2, 3, 16, 16),)
    with pytest.raises(elsa_compile.ElsaError, match="stem.weight: smaller than 1024 bytes"):
        elsa_compile.apply(cnn, QuantizeWeights(), example_inputs=example)


def test_a_tied_weight_wants_one_rule(load):
    with pytest.raises(elsa_compile.ElsaError, match="both embedding .int8. and head .int4."):
        pruned(load("llama-tied"), head="int4")
    program = pruned(load("llama-tied"), head="none", embedding="none")
    assert "model.embed_tokens.weight" not in program.grids()
    assert "model.embed_tokens.weight" not in program.plans


def test_targets_and_ignore_choose(load):
    program = pruned(load("llama"), targets=["re:.*mlp.*"], ignore=["re:.*layers\\.1\\..*"])
    assert sorted(program.grids()) == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": "int3"}, "bits is 'int3', wanted one of int8, int4"),
        ({"bits": 4}, "bits is 4, wanted text"),
        ({"method": "gptq"}, "method is 'gptq', wanted one of rtn, compensated"),
        ({"group_size": 1}, "group_size is 1, wanted at least 2"),
        ({"group_size": 48}, r"q_proj.weight has K=32 is no multiple of group_size 48; add it to"),
        ({"ignore": ["Linaer"]}, "'Linaer' matches no weight; did you mean 'Linear'"),
    ],
)
def test_bad_options_are_said(load, options, said):
    with pytest.raises(elsa_compile.ElsaError, match=said):
        elsa_compile.apply(load("llama"), QuantizeWeights(**options))


def test_compensation_without_data_is_refused(load):
    step = QuantizeWeights(method="compensated")
    with pytest.raises(elsa_compile.ElsaError, match="quantize-weights needs calibration data"):
        elsa_compile.apply(load("llama"), step)
    assert QuantizeWeights().needs_data is False


@pytest.mark.parametrize("late", [PruneMagnitude(), FinetuneMasked(steps=1)])
def test_what_would_leave_the_grid_is_refused_behind_it(load, late):
    steps = (AllocateUniform(), PruneMagnitude(), QuantizeWeights(), late)
    with pytest.raises(elsa_compile.ElsaError, match=f"{late.name} moves weights off the grid"):
        elsa_compile.apply(load("llama"), *steps, data=batches())


def test_the_checker_sees_values_and_scales_off_the_grid(load):
    program = pruned(load("llama"))
    check(program, Fact.QUANTIZED)
    weight = next(iter(program.prunable.values()))
    kept = weight.matrix().clone()
    weight.matrix()[0, 0] += 1e-4
    with pytest.raises(FactError, match=f"{weight.name} has 1 entries off its int8 grid"):
        check(program, Fact.QUANTIZED)
    weight.write(kept * 1.5)
    with pytest.raises(FactError, match="off its int8 grid|steps, its int8 grid has 127"):
        check(program, Fact.QUANTIZED)
    weight.write(kept)
    program.plans[weight.name].grid.scale[0] = 0
    with pytest.raises(FactError, match="not positive and finite"):
        check(program, Fact.QUANTIZED)


def test_a_second_kind_of_grid_replaces_the_first(load):
    program = pruned(load("llama"))
    elsa_compile.apply(program, QuantizeWeights(bits="int4", head="int4"))
    assert {grid.bits for grid in program.grids().values()} == {4, 8}
    assert program.grids()["model.embed_tokens.weight"].bits == 8
    assert program.grids()["lm_head.weight"].bits == 4


def test_short_scales_are_float16_numbers_and_what_they_cannot_hold_is_refused(load):
    program = load("llama")
    exact = {n: w.matrix().clone() for n, w in program.weights.items()}
    rule = QuantizeWeights(bits="int4", group_size=8, scales="float16")
    elsa_compile.apply(program, rule)
    for name, grid in program.grids().items():
        assert grid.half
        assert torch.equal(grid.scale, grid.scale.half().float())
        error = (program.weights[name].matrix() - exact[name]).norm() / exact[name].norm()
        assert error < (0.01 if grid.bits == 8 else 0.13)
    once = {n: w.parameter.clone() for n, w in program.weights.items()}
    elsa_compile.apply(program, rule)
    assert all(torch.equal(w.parameter, once[n]) for n, w in program.weights.items())
    elsa_compile.apply(program, QuantizeWeights(bits="int4", group_size=8))
    assert not any(grid.half for grid in program.grids().values())
    for factor in (1e-8, 1e8):
        program = load("llama")
        with torch.no_grad():
            program.weights["model.layers.1.mlp.up_proj.weight"].parameter.mul_(factor)
        with pytest.raises(elsa_compile.ElsaError, match=r"1\.mlp\.up_proj.*float16 cannot hold"):
            elsa_compile.apply(program, rule)
