"""prune-elsa and finetune-masked on small models: promises, stopping, resuming, diverging."""

import copy
import math
import signal
from dataclasses import replace

import pytest
import torch

import elsa_compile
from elsa_compile import data, frontend, pipeline
from elsa_compile.errors import ElsaError, UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context
from elsa_compile.passes import (
    AllocateUniform,
    FinetuneMasked,
    PruneElsa,
    PruneMagnitude,
    QuantizeWeights,
    training,
)
from elsa_compile.passes.adam import Adam
from elsa_compile.passes.admm_constraint import Admm
from elsa_compile.passes.gradient_release import GradientRelease
from elsa_compile.progress import Silent
from elsa_compile.training_data import training_data

DEVICE = "cpu"
SMALL = {"batch_size": 4, "interval": 2, "precision": "fp32"}


@pytest.fixture(
    autouse=True,
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
    if torch.cuda.is_available()
    else ["cpu"],
)
def device(request):
    """Every test here runs on each device there is."""
    global DEVICE
    DEVICE = request.param


def apply(*args, **kwargs):
    return elsa_compile.apply(*args, device=DEVICE, **kwargs)


def batches(count=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (4, 16), generator=generator) for _ in range(count)]


def context(program, tmp_path=None, batches_=None, seed=0):
    held = batches_ or batches()
    samples = data.python_samples(program, held)
    stream = training_data(program, held, samples)
    return Context(samples, torch.device(DEVICE), seed, Silent(), stream, tmp_path)


def weights(program):
    return {n: w.parameter.detach().clone() for n, w in program.weights.items()}


def equal(a, b):
    """Bit for bit on a CPU; atomic additions on a GPU come in any order."""
    same = torch.equal if DEVICE == "cpu" else torch.allclose
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


@pytest.fixture
def program(make_family):
    return frontend.from_module(make_family("llama"))


def loss_of(program):
    rows = torch.cat(batches(2))
    scores = program.module(input_ids=rows).logits
    return float(
        torch.nn.functional.cross_entropy(
            scores[:, :-1].reshape(-1, scores.shape[-1]), rows[:, 1:].reshape(-1)
        ).detach()
    )


# --- What it does -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "4x4"])
@pytest.mark.parametrize("options", [{}, {"lam": 1e-2, "refine": 0.0}, {"anneal": 0.5}])
def test_exact_sparsity_in_every_pattern(program, pattern, options):
    sparsity = None if pattern == "2:4" else 0.75
    allocate = AllocateUniform(sparsity=sparsity, pattern=pattern)
    apply(program, allocate, PruneElsa(steps=8, **SMALL, **options), data=batches())
    for weight, _ in program.planned():
        wanted = 0.5 if pattern == "2:4" else 0.75
        zeros = float((weight.parameter == 0).double().mean())
        assert zeros == pytest.approx(wanted, abs=1.0 / min(weight.matrix().shape))


def test_it_learns_what_magnitude_forgets(make_family):
    """On data it can memorise, the trained sparse model is far better than the one-shot one."""
    pruned = frontend.from_module(make_family("llama"))
    apply(pruned, AllocateUniform(sparsity=0.8), PruneMagnitude())
    trained = frontend.from_module(make_family("llama"))
    step = PruneElsa(steps=60, lr=1e-2, **SMALL)
    apply(trained, AllocateUniform(sparsity=0.8), step, data=batches(2))
    assert loss_of(trained) < 0.8 * loss_of(pruned)


def test_the_iterates_meet_at_the_end(program):
    step = PruneElsa(steps=120, lr=3e-3, refine=0.0, **SMALL)
    apply(program, AllocateUniform(sparsity=0.7), step, data=batches(2))
    curves = program.history[-1].stats.curves
    primal = [value for _, value in curves["primal"]]
    assert primal[-1] < 0.25 * primal[0]
    assert {"dual", "churn", "penalty", "loss", "lr"} <= set(curves)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama-tied"])
def test_transposed_biased_and_tied_weights(make_family, family):
    program = frontend.from_module(make_family(family))
    apply(program, AllocateUniform(sparsity=0.6), PruneElsa(steps=6, **SMALL), data=batches())
    assert program.history[-1].stats.counts["zeros"] > 0


def test_models_without_next_tokens_learn_from_themselves(cnn):
    torch.manual_seed(0)
    images = [torch.randn(4, 3, 16, 16) for _ in range(8)]
    dense = copy.deepcopy(cnn)
    example = (images[0][:2],)
    step = PruneElsa(steps=40, lr=3e-3, **SMALL)
    program = apply(cnn, AllocateUniform(sparsity=0.6), step, data=images, example_inputs=example)
    once = copy.deepcopy(dense)
    apply(once, AllocateUniform(sparsity=0.6), PruneMagnitude(), example_inputs=example)
    wanted = dense(images[0])
    error = (cnn(images[0]) - wanted).square().mean()
    assert float(error) < 0.7 * float((once(images[0]) - wanted).square().mean())
    assert program.history[-1].stats.counts["loss"] < 1.0


@pytest.mark.parametrize("loss", ["kd", "ce+kd"])
def test_distillation(program, loss):
    step = PruneElsa(steps=6, loss=loss, **SMALL)
    apply(program, AllocateUniform(sparsity=0.5), step, data=batches())
    assert program.history[-1].stats.counts["loss"] >= 0.0


@pytest.mark.parametrize(("rows", "judged"), [(24, False), (25, True), (100, True)])
def test_the_dense_model_is_trusted_fully_where_the_text_comes_more_than_twice(
    program, rows, judged
):
    """50 rows of steps over text of so many rows: 2.1, 2 and 0.5 times."""
    step = PruneElsa(steps=10, loss="ce+kd", **SMALL | {"batch_size": 5})
    ctx = context(program, batches_=batches(12))
    honest = ctx.training

    def counted(*args):
        stream = honest(*args)
        held = [{"input_ids": rows} for rows in batches(2, seed=9)]
        object.__setattr__(stream, "validation", lambda: held)  # it is frozen
        object.__setattr__(stream, "count", rows)
        return stream

    pipeline.run(program, [AllocateUniform(sparsity=0.5), step], replace(ctx, training=counted))
    curves = program.history[-1].stats.curves
    shares = [value for _, value in curves["distillation"]]
    assert shares[0] == 0.5  # nothing was judged yet
    assert (shares[-1] != 0.5) == judged
    assert max(shares) <= 0.5
    # What is watched is the cross-entropy either way, of held-out text.
    assert 4.0 < curves["validation"][0][1] < 20.0


def test_micro_batches_change_nothing_but_rounding(make_family):
    found = []
    for micro in (1, 4):
        program = frontend.from_module(make_family("llama"))
        step = PruneElsa(steps=4, micro_batch=micro, lr=1e-4, **SMALL)
        apply(program, AllocateUniform(sparsity=0.5), step, data=batches())
        found.append(loss_of(program))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_checkpointing_changes_nothing(make_family):
    found = []
    for wanted in (False, True):
        program = frontend.from_module(make_family("llama"))
        step = PruneElsa(steps=4, checkpoint_activations=wanted, **SMALL)
        apply(program, AllocateUniform(sparsity=0.5), step, data=batches())
        found.append(weights(program))
    assert equal(*found)
    assert "forward" not in program.module.model.layers[0].__dict__


@pytest.mark.parametrize("states", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-tied"])
def test_released_gradients_give_the_same_weights_and_never_all_exist(
    make_family, monkeypatch, family, states
):
    """The norm to clip by is one step old, so it is taken out of the comparison."""
    monkeypatch.setattr(training, "CLIP", 1e9)
    found, most = {}, {}
    for released in (False, True):
        program = frontend.from_module(make_family(family))
        alive: list[int] = []

        def count(parameter, program=program, alive=alive):
            alive.append(sum(p.grad is not None for p in program.module.parameters()))

        for parameter in program.module.parameters():
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(count)
        step = PruneElsa(steps=12, states=states, gradient_release=released, **SMALL)
        apply(program, AllocateUniform(sparsity=0.6), step, data=batches())
        found[released], most[released] = weights(program), max(alive)
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=0, atol=0)
    assert most[True] <= 2 < most[False]


def test_released_gradients_are_clipped_by_the_last_norm(program):
    adam = Adam(list(program.module.named_parameters()))
    release = GradientRelease(adam, 1.0)
    for parameter in adam.parameters.values():
        parameter.requires_grad_(True)
    seen: list[float] = []
    monkey = adam.update
    adam.update = lambda names, lr: (
        seen.append(float(adam.parameters[names[0]].grad.square().sum())),
        monkey(names, lr),
    )
    with release.attached():
        for _ in range(2):
            seen.clear()
            release.begin(0.0)
            sum((100 * p).sum() for p in adam.parameters.values()).backward()
            norm = release.finish()
    entries = sum(p.numel() for p in adam.parameters.values())
    assert norm == pytest.approx(100 * entries**0.5, rel=1e-4)
    assert math.sqrt(sum(seen)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 4, "micro_batch": 2}, "whole batches at once"),
        ({"lam": 1e-2}, "use lam=auto"),
    ],
)
def test_gradient_release_says_what_it_cannot_do(program, options, said):
    options = {**SMALL, "steps": 2, "gradient_release": True, **options}
    with pytest.raises(UserInputError, match=said):
        apply(program, AllocateUniform(sparsity=0.6), PruneElsa(**options), data=batches())


def test_parameters_are_left_as_they_were_found(program):
    for parameter in program.module.parameters():
        parameter.requires_grad_(False)
    step = PruneElsa(steps=3, **SMALL)
    apply(program, AllocateUniform(sparsity=0.5), step, data=batches())
    assert not any(p.requires_grad or p.grad is not None for p in program.module.parameters())


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"states": "fp32", "merged_state": "fp32"}, 12.2),
        ({"states": "int8", "merged_state": "bf16"}, 4.2),
        ({"states": "int8", "merged_state": "fp8"}, 3.25),
    ],
)
def test_bytes_a_parameter(options, most):
    """Adam's moments and the merged state of a matrix, all of it prunable."""
    linear = torch.nn.Linear(512, 1024, bias=False)
    program = frontend.from_module(linear, (torch.randn(2, 512),))
    apply(program, AllocateUniform(sparsity=0.5))
    step = PruneElsa(steps=4, **options)
    adam = training.Adam([("weight", linear.weight)], options["states"])
    admm = Admm(step, list(program.planned()), adam, 4)
    held = adam.state_bytes() + admm.state_bytes()
    assert held / linear.weight.numel() <= most


# --- Stopped and resumed ------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process' death: nothing of ours handles it."""


def interrupted(monkeypatch, at):
    """Training that dies before step `at`, leaving what is on disk."""
    original = training.Training.gradient

    def gradient(self):
        if self.step == at:
            raise Killed
        return original(self)

    monkeypatch.setattr(training.Training, "gradient", gradient)


@pytest.mark.parametrize("states", ["fp32", "int8"])
@pytest.mark.parametrize("at", [3, 9])
def test_a_killed_run_goes_on_bit_for_bit(make_family, tmp_path, monkeypatch, states, at):
    merged = "fp32" if states == "fp32" else "bf16"
    passes = (
        AllocateUniform(sparsity=0.7),
        PruneElsa(steps=10, states=states, merged_state=merged, snapshot_minutes=0.0, **SMALL),
    )
    straight = frontend.from_module(make_family("llama"))
    pipeline.run(straight, passes, context(straight, tmp_path / "a"))
    killed = frontend.from_module(make_family("llama"))
    with monkeypatch.context() as patch:
        interrupted(patch, at)
        with pytest.raises(Killed):
            pipeline.run(killed, passes, context(killed, tmp_path / "b"))
    held = sorted((tmp_path / "b" / "prune-elsa").glob("step-*"))
    assert 1 <= len(held) <= 2
    again = frontend.from_module(make_family("llama"))
    pipeline.run(again, passes, context(again, tmp_path / "b"))
    assert equal(weights(straight), weights(again))
    first, second = (p.history[-1].stats.curves for p in (straight, again))
    assert first == second


def test_a_cut_off_snapshot_is_passed_over(make_family, tmp_path):
    passes = (AllocateUniform(sparsity=0.7), PruneElsa(steps=6, snapshot_minutes=0.0, **SMALL))
    program = frontend.from_module(make_family("llama"))
    pipeline.run(program, passes, context(program, tmp_path))
    newest = sorted((tmp_path / "prune-elsa").glob("step-*"))[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    again = frontend.from_module(make_family("llama"))
    pipeline.run(again, passes, context(again, tmp_path))
    assert equal(weights(program), weights(again))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 2e-3}, r"prune-elsa.lr was 'auto' and is 0.002"),
        ({"steps": 12}, r"prune-elsa.steps was 10 and is 12"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(make_family, tmp_path, change, said):
    def run(**options):
        program = frontend.from_module(make_family("llama"))
        step = PruneElsa(**{"steps": 10, **SMALL, **options})
        pipeline.run(program, (AllocateUniform(sparsity=0.7), step), context(program, tmp_path))

    run()
    with pytest.raises(UserInputError, match=said):
        run(**change)


def test_another_sparsity_or_model_is_refused(make_family, tmp_path):
    def run(sparsity, family):
        program = frontend.from_module(make_family(family))
        passes = (AllocateUniform(sparsity=sparsity), PruneElsa(steps=3, **SMALL))
        pipeline.run(program, passes, context(program, tmp_path))

    run(0.7, "llama")
    one_weight = r"the plan: [\w.]+ was \[[^\]]*\] and is \[[^\]]*\]( \(and \d+ more\))?; undo"
    with pytest.raises(UserInputError, match=one_weight):
        run(0.8, "llama")
    with pytest.raises(UserInputError, match="the model's weights was"):
        run(0.7, "qwen2")


def test_control_c_leaves_a_state_to_go_on_from(make_family, tmp_path, monkeypatch):
    passes = (AllocateUniform(sparsity=0.7), PruneElsa(steps=10, **SMALL))
    straight = frontend.from_module(make_family("llama"))
    pipeline.run(straight, passes, context(straight, tmp_path / "a"))
    original = training.Training.gradient

    def gradient(self):
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    stopped = frontend.from_module(make_family("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "gradient", gradient)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(stopped, passes, context(stopped, tmp_path / "b"))
    assert (tmp_path / "b" / "prune-elsa" / "step-00000005.safetensors").exists()
    again = frontend.from_module(make_family("llama"))
    pipeline.run(again, passes, context(again, tmp_path / "b"))
    assert equal(weights(straight), weights(again))


# --- What goes wrong ----------------------------------------------------------------------


def test_divergence_goes_back_with_half_the_step(program, tmp_path, monkeypatch):
    original = training.Training.gradient
    seen = []

    def gradient(self):
        seen.append((self.step, self.lr_scale))
        loss = original(self)
        return float("nan") if self.step == 5 and self.lr_scale == 1.0 else loss

    monkeypatch.setattr(training.Training, "gradient", gradient)
    step = PruneElsa(steps=8, snapshot_minutes=0.0, **SMALL)
    pipeline.run(program, (AllocateUniform(sparsity=0.7), step), context(program, tmp_path))
    assert (5, 0.5) in seen
    assert program.history[-1].stats.counts["steps"] == 8


def test_it_gives_up_after_two_tries(program, tmp_path, monkeypatch):
    monkeypatch.setattr(training.Training, "gradient", lambda self: float("inf"))
    step = PruneElsa(steps=8, **SMALL)
    with pytest.raises(ElsaError, match="diverged at step 0.*halved 2 times.*set lr below"):
        pipeline.run(program, (AllocateUniform(sparsity=0.7), step), context(program, tmp_path))


def test_out_of_memory_names_what_would_fit(program, monkeypatch):
    def gradient(self):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Training, "gradient", gradient)
    with pytest.raises(UserInputError, match="micro_batch.*checkpoint_activations.*elsa-l"):
        apply(program, AllocateUniform(sparsity=0.7), PruneElsa(steps=2, **SMALL), data=batches())


def test_losses_that_do_not_fit_the_model(cnn):
    with pytest.raises(UserInputError, match="predicts no next tokens"):
        apply(
            cnn, AllocateUniform(sparsity=0.5), PruneElsa(loss="ce", steps=2),
            data=[torch.randn(4, 3, 16, 16)], example_inputs=(torch.randn(2, 3, 16, 16),),
        )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"lr": "fast"}, {"lam": "big"}, {"refine": 1.0}, {"interval": 0}]
)
def test_options_out_of_range(options):
    with pytest.raises(UserInputError, match=f"prune-elsa: {next(iter(options))}"):
        PruneElsa(**options)


# --- Joint quantisation -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bits", "group_size"), [("llama", "int4", 16), ("gpt2", "int8", None)]
)
def test_kept_weights_end_on_the_grid_and_pruned_ones_at_zero(
    make_family, family, bits, group_size
):
    program = frontend.from_module(make_family(family))
    step = PruneElsa(steps=20, quantize=bits, group_size=group_size, **SMALL)
    apply(program, AllocateUniform(sparsity=0.6), step, data=batches())
    assert Fact.QUANTIZED in program.facts
    grids = program.grids()
    for weight, plan in program.planned():
        matrix, grid = weight.matrix(), grids[weight.name]
        assert grid.bits == int(bits[3:])
        assert grid.group_size(matrix.shape[1]) == group_size
        assert int((matrix == 0).sum()) >= int((~plan.mask).sum())
        assert not matrix[~plan.mask].any()
        steps = matrix.reshape(matrix.shape[0], grid.scale.shape[1], -1) / grid.scale[:, :, None]
        assert float((steps - steps.round()).abs().max()) < 1e-3
        assert float(steps.abs().max()) < grid.limit + 0.5
        assert len(steps.round().unique()) > 4


def test_joint_int4_beats_rounding_afterwards():
    """Correlated inputs, where errors of one weight can be made up for by others."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 24, bias=False), torch.nn.Linear(24, 16, bias=False)]
    dense = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
    mix = torch.randn(32, 32) * torch.logspace(0, -2, 32)[:, None]
    rows = [torch.randn(32, 32) @ mix for _ in range(16)]
    probe, found = torch.cat(rows), {}
    for joint in (True, False):
        model = copy.deepcopy(dense)
        options = {**SMALL, "batch_size": 32, "interval": 4, "steps": 600, "lr": 1e-2}
        step = PruneElsa(quantize="int4" if joint else "none", **options)
        after = [] if joint else [QuantizeWeights(bits="int4")]
        program = apply(
            model, AllocateUniform(sparsity=0.25), step, *after, data=rows,
            example_inputs=(rows[0][:2],),
        )  # fmt: skip
        assert len(program.grids()) == 2
        found[joint] = float((model(probe) - dense(probe)).detach().square().mean())
    assert found[True] < 0.7 * found[False]  # 0.54 when written


def test_a_killed_joint_run_goes_on_bit_for_bit(make_family, tmp_path, monkeypatch):
    whole = frontend.from_module(make_family("llama"))
    step = PruneElsa(steps=20, quantize="int4", snapshot_minutes=0.0, **SMALL)
    passes = (AllocateUniform(sparsity=0.6), step)
    pipeline.run(whole, passes, context(whole))
    cut = frontend.from_module(make_family("llama"))
    advance = training.Training.advance

    def killed(self):
        if self.step == 17:
            raise RuntimeError("killed")
        return advance(self)

    monkeypatch.setattr(training.Training, "advance", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pipeline.run(cut, passes, context(cut, tmp_path))
    monkeypatch.undo()
    again = frontend.from_module(make_family("llama"))
    pipeline.run(again, passes, context(again, tmp_path))
    assert equal(weights(again), weights(whole))


@pytest.mark.parametrize(
    ("options", "said"), [({"refine": 0.0}, "refine is 0"), ({"group_size": 7}, "group_size 7")]
)
def test_joint_quantisation_says_what_it_cannot_do(program, options, said):
    options = {**SMALL, "steps": 4, "quantize": "int8", **options}
    with pytest.raises(UserInputError, match=said):
        apply(program, AllocateUniform(sparsity=0.5), PruneElsa(**options), data=batches())


# --- finetune-masked ----------------------------------------------------------------------


def test_masked_finetuning_keeps_every_zero_and_learns(program):
    passes = (AllocateUniform(sparsity=0.8), PruneMagnitude())
    apply(program, *passes)
    zeros = {n: v == 0 for n, v in weights(program).items()}
    before = loss_of(program)
    apply(
        program, FinetuneMasked(steps=40, lr=1e-2, batch_size=4, precision="fp32"), data=batches(2)
    )
    after = weights(program)
    for weight, _ in program.planned():
        assert torch.equal(after[weight.name] == 0, zeros[weight.name])
    assert loss_of(program) < 0.8 * before


def test_masked_finetuning_has_no_dense_model_to_learn_from(program):
    apply(program, AllocateUniform(sparsity=0.5), PruneMagnitude())
    with pytest.raises(
        UserInputError, match="finetune-masked: loss is 'ce.kd'.*dense model is gone"
    ):
        apply(program, FinetuneMasked(loss="ce+kd", steps=2), data=batches())


# --- Devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"states": "int8", "merged_state": "fp8"}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_trains_where_told_and_gives_the_weights_back(make_family, family, options):
    program = frontend.from_module(make_family(family))
    before = loss_of(program)
    step = PruneElsa(steps=60, lr=1e-2, **{**SMALL, **options})
    apply(program, AllocateUniform(sparsity=0.8), step, data=batches(2))
    assert all(p.device.type == "cpu" for p in program.module.parameters())
    assert loss_of(program) < before


def test_few_of_many_held_out_rows_watch_a_short_run():
    """Else watching costs more than training; rows are spread over all that is held out."""
    batches = [{"x": torch.arange(8), "y": torch.arange(8) * 2}, {"x": torch.arange(8, 11)}]
    assert training.spread_rows(batches, 11) == batches
    found = training.spread_rows(batches, 4)
    assert [batch["x"].tolist() for batch in found] == [[0, 2, 5], [8]]
    assert found[0]["y"].tolist() == [0, 4, 10]
    assert training.spread_rows([], 8) == []
