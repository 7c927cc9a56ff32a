"""How a total of zeros is distributed: exact counts, outliers, one threshold, budgets."""

import pytest
import torch
from torch import nn

import elsa_compile
from elsa_compile import data, frontend
from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import Context
from elsa_compile.passes import (
    AllocateBudget,
    AllocateFisher,
    AllocateOWL,
    AllocatePlan,
    AllocateUniform,
    PruneMagnitude,
)
from elsa_compile.passes.allocate_budget import fewest_zeros
from elsa_compile.passes.allocate_owl import layer_of, outlier_ratio, owl_sparsities
from elsa_compile.passes.allocate_plan import plan_to_yaml
from elsa_compile.passes.allocation import Pieces, evenly, exact_zeros, pieces, sparsity_of
from elsa_compile.passes.file_size import index_bytes, parse_size, size_text, stored_bytes
from elsa_compile.passes.fisher import noise_loss, sampled_label_loss, squared_gradients
from elsa_compile.passes.global_threshold import kept_bounds, kept_pieces, piece_scores
from elsa_compile.patterns import Block, Unstructured, pruned_count
from elsa_compile.program import WeightPlan
from elsa_compile.progress import Silent


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (2, 24), generator=generator) for _ in range(4)]


@pytest.fixture(scope="module")
def traced(make_family):
    """One traced LLaMA for the passes that only plan: they change no weight."""
    return frontend.from_module(make_family("llama"))


def zeros_planned(program):
    total = 0
    for plan in program.plans.values():
        if plan.skipped is None:
            part = pieces(plan)
            total += pruned_count(part.count, plan.sparsity) * part.size
    return total


def entries_planned(program):
    return sum(p.shape[0] * p.shape[1] for p in program.plans.values() if p.skipped is None)


# --- Exact counts -----------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, 1, 7, 17, 31])
def test_the_total_is_met_exactly(total):
    parts = [Pieces(7, 1), Pieces(11, 1), Pieces(16, 1)]
    zeros = exact_zeros([total / 34] * 3, parts, total)
    assert sum(zeros) == total
    assert all(
        abs(z - total / 34 * p.count) < 1 or z == p.count - 1
        for z, p in zip(zeros, parts, strict=True)
    )


def test_every_weight_keeps_a_piece():
    assert exact_zeros([0.99, 0.99], [Pieces(2, 1), Pieces(3, 1)], 5) == [1, 2]


def test_whole_pieces_meet_the_total_to_less_than_a_piece():
    parts = [Pieces(10, 16), Pieces(30, 16)]
    zeros = exact_zeros([0.51] * 2, parts, 327)
    assert 327 - 16 < sum(zeros) * 16 <= 327


def test_a_sparsity_rounds_back_to_its_count():
    for count in (1, 3, 7, 100, 4097, 9_437_184):
        for zeros in {0, count // 3, count // 2, count - 1}:
            value = sparsity_of(zeros, count)
            assert 0 <= value < 1
            assert pruned_count(count, value) == zeros
    assert sparsity_of(512, 1024) == 0.5


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [(Unstructured(), Pieces(32, 1)), (Unstructured(per_row=True), Pieces(8, 4)),
     (Block(2, 4), Pieces(4, 8))],
)  # fmt: skip
def test_patterns_prune_in_pieces(pattern, wanted):
    assert pieces(WeightPlan((4, 8), pattern=pattern)) == wanted


# --- OWL --------------------------------------------------------------------------------------


def test_blocks_are_read_from_names():
    assert layer_of("transformer.h.3.attn.c_attn.weight") == "transformer.h.3"
    assert layer_of("model.layers.3.experts.11.up.weight") == "model.layers.3"
    assert layer_of("lm_head.weight") == "lm_head.weight"


def test_the_outlier_ratio_of_a_layer_by_hand():
    # |W| ||X||: [1 1 1 1] and [1 1 1 17]; mean 3, so one of eight is over 5 times the mean.
    first, second = torch.ones(2, 2), torch.tensor([[1.0, -1.0, 1.0, 8.5]])
    ratio = outlier_ratio([first, second], [torch.ones(2), torch.tensor([1.0, 1, 1, 4])], 5.0)
    assert ratio == 1 / 8
    # By itself the second weight has mean 5 and none.
    assert outlier_ratio([second], [torch.tensor([1.0, 1, 1, 4])], 5.0) == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.5])
def test_owl_keeps_the_mean_and_the_bounds(sparsity, spread):
    ratios, sizes = [0.01, 0.012, 0.05, 0.011], [100, 300, 200, 50]
    found = owl_sparsities(ratios, sizes, sparsity, spread)
    mean = sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(sparsity, abs=1e-12)
    assert max(abs(s - sparsity) for s in found) <= spread + 1e-12
    assert all(-1e-12 <= s < 1 for s in found)
    # More outliers, fewer zeros.
    assert sorted(found, reverse=True) == [found[i] for i in (0, 3, 1, 2)]


def test_equal_outlier_ratios_give_equal_sparsities():
    assert owl_sparsities([0.1, 0.1, 0.1], [10, 20, 30], 0.7, 0.08) == [0.7] * 3


def test_owl_gives_the_layer_with_outliers_more(make_family, batches):
    model = make_family("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers.1." in name and parameter.dim() == 2:
                parameter[::8, ::8] *= 30
    program = elsa_compile.apply(model, AllocateOWL(sparsity=0.7), data=batches)
    sparsities = {n: p.sparsity for n, p in program.plans.items() if p.skipped is None}
    first = {round(s, 2) for n, s in sparsities.items() if ".layers.0." in n}
    second = {round(s, 2) for n, s in sparsities.items() if ".layers.1." in n}
    assert (first, second) == ({0.78}, {0.62})
    assert zeros_planned(program) == pruned_count(entries_planned(program), 0.7)


# --- One threshold ----------------------------------------------------------------------------


def test_one_threshold_by_hand():
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.5, 5.0, 6.0, 7.0])
    assert kept_pieces([first, second], [1, 1], 4, [0, 0], [4, 4]) == [1, 3]
    assert kept_pieces([first, second], [1, 1], 4, [2, 0], [4, 4]) == [2, 2]  # a floor
    assert kept_pieces([first, second], [1, 1], 4, [0, 0], [4, 2]) == [2, 2]  # a cap


@pytest.mark.parametrize("total", [2, 3, 10, 99, 150, 198, 200])
def test_one_threshold_meets_the_total_despite_ties_and_zeros(total):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 4, (100,), generator=generator).float().sort().values for _ in "ab"]
    counts = kept_pieces(rows, [1, 1], total, [1, 1], [100, 100])
    assert sum(counts) == total
    assert kept_pieces(rows, [1, 1], total, [1, 1], [100, 100]) == counts


def test_more_to_keep_never_takes_from_a_weight():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(50, generator=generator).sort().values * scale for scale in (1, 2, 8)]
    before = [0, 0, 0]
    for total in range(3, 151):
        counts = kept_pieces(rows, [1] * 3, total, [1] * 3, [50] * 3)
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        before = counts


def test_pieces_cost_what_their_entries_cost():
    scores = torch.tensor([[1.0, 2, 9, 4], [3, 8, 0, 5]])
    assert piece_scores(scores, Unstructured()).tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert piece_scores(scores, Unstructured(per_row=True)).tolist() == [0.5, 2.5, 4.5, 8.5]
    assert piece_scores(scores, Block(2, 2)).tolist() == [3.5, 4.5]


def test_bounds_are_shares_of_the_mean_density():
    least, most = kept_bounds([Pieces(1000, 1), Pieces(10, 4)], 0.1, 0.4, 3.0)
    assert (least, most) == ([40, 1], [300, 3])
    assert kept_bounds([Pieces(10, 1)], 1.0, 0.4, 3.0) == ([4], [10])


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "4x4"])
def test_the_planned_total_is_exact_and_pruning_follows(make_family, batches, sparsity, pattern):
    step = AllocateFisher(sparsity=sparsity, pattern=pattern, floor=0.5, cap=2.0)
    program = elsa_compile.apply(make_family("llama"), step, PruneMagnitude(), data=batches)
    entries = entries_planned(program)
    largest = {"unstructured": 1, "row": 64, "4x4": 16}[pattern]
    missed = pruned_count(entries, sparsity) - zeros_planned(program)
    assert abs(missed) < largest
    zeros = sum(int((~plan.mask).sum()) for _, plan in program.planned())
    assert zeros == zeros_planned(program)
    for _, plan in program.planned():
        part = pieces(plan)
        kept = 1 - pruned_count(part.count, plan.sparsity) / part.count
        assert 0.5 * (1 - sparsity) - 1 / part.count <= kept
        assert kept <= 2.0 * (1 - sparsity) + 1 / part.count


# --- Fisher information -----------------------------------------------------------------------


def squares(program, samples):
    ctx = Context(samples, torch.device("cpu"), 0, Silent())
    chosen = list(program.prunable.values())
    return squared_gradients(AllocateFisher(), program, chosen, samples, ctx)


def test_squared_gradients_are_those_of_the_next_token_loss(make_family, batches):
    model = make_family("llama")
    program = frontend.from_module(model)
    samples = data.python_samples(program, batches)
    found = squares(program, samples)
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = torch.zeros(32, 32)
    for ids in batches:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        wanted += model.get_parameter(name).grad.square() / len(batches)
    assert torch.allclose(found[name], wanted, rtol=1e-3, atol=1e-9)


def test_the_traced_graph_gives_the_same_gradients(make_family, batches):
    program = frontend.from_module(make_family("gpt2"))
    samples = data.python_samples(program, batches)
    by_module = squares(program, samples)
    program.module = None
    by_graph = squares(program, samples)
    for name, value in by_module.items():
        assert value.shape == program.weights[name].matrix_shape
        scale = float(value.max())
        assert torch.allclose(by_graph[name], value, rtol=1e-2, atol=1e-4 * scale), name


def test_nothing_of_the_model_is_left_changed(make_family, batches):
    model = make_family("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    kept = model.model.layers[1].mlp.up_proj.weight
    kept.grad = torch.ones_like(kept)
    model.model.layers[1].train()
    program = frontend.from_module(model)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        elsa_compile.apply(program, AllocateFisher(sparsity=0.6), data=batches)
    assert not frozen.requires_grad
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert [m.training for m in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_the_callers_inference_mode_does_not_matter(traced, batches):
    samples = data.python_samples(traced, batches)
    wanted = squares(traced, samples)
    with torch.inference_mode():
        found = squares(traced, samples)
    for name, value in wanted.items():
        assert torch.equal(found[name], value)


def test_the_information_of_class_scores_without_labels():
    """For softmax outputs it is diag(p) - p p^T; the draws' mean comes near its diagonal."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    chances = scores.detach().softmax(dim=1)[0]
    total = torch.zeros(3)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(sampled_label_loss(scores, generator), scores)
        total += gradient[0].square() / 2000
    assert torch.allclose(total, chances * (1 - chances), atol=0.02)


def test_the_information_of_other_outputs_is_that_of_a_gaussian():
    """For outputs J w it is the diagonal of J^T J."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    weight = torch.ones(2, requires_grad=True)
    total = torch.zeros(2)
    for _ in range(2000):
        loss = noise_loss([jacobian @ weight, torch.tensor([1, 2])], generator)
        (gradient,) = torch.autograd.grad(loss, weight)
        total += gradient.square() / 2000
    assert torch.allclose(total, (jacobian.t() @ jacobian).diagonal(), rtol=0.1)


def test_models_without_tokens_are_planned_too(cnn, mlp, make_bert):
    images = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    program = elsa_compile.apply(
        cnn, AllocateFisher(sparsity=0.5), data=images, example_inputs=(images[0],)
    )
    assert zeros_planned(program) == pruned_count(entries_planned(program), 0.5)
    rows = [torch.randn(4, 16) for _ in range(3)]
    for loss in ("auto", "labels", "outputs"):
        step = AllocateFisher(sparsity=0.5, loss=loss)
        program = elsa_compile.apply(mlp, step, data=rows, example_inputs=(rows[0],))
        assert zeros_planned(program) == entries_planned(program) / 2
    ids = [torch.randint(0, 300, (2, 12)) for _ in range(3)]
    program = elsa_compile.apply(make_bert(), AllocateFisher(sparsity=0.5), data=ids)
    assert zeros_planned(program) == entries_planned(program) / 2


def test_a_loss_that_does_not_fit_is_said(mlp, make_bert):
    rows = [torch.randn(4, 16)]
    step = AllocateFisher(loss="next-token")
    with pytest.raises(UserInputError, match="does not score each next token"):
        elsa_compile.apply(mlp, step, data=rows, example_inputs=(rows[0],))
    ids = [torch.randint(0, 300, (2, 12))]
    with pytest.raises(UserInputError, match="not class scores .*choose outputs"):
        elsa_compile.apply(make_bert(), AllocateFisher(loss="labels"), data=ids)


def test_the_weight_that_matters_keeps_more():
    """Of two layers in parallel one reaches the output a hundred times weaker."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.strong, self.weak = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            return self.strong(x) + 0.01 * self.weak(x)

    rows = [torch.randn(8, 16) for _ in range(4)]
    program = elsa_compile.apply(
        Parallel().eval(), AllocateFisher(sparsity=0.5), data=rows, example_inputs=(rows[0],)
    )
    strong, weak = (program.plans[f"{name}.weight"].sparsity for name in ("strong", "weak"))
    assert strong < 0.3
    assert weak == pytest.approx(0.8, abs=0.01)  # the floor, 0.4 of density 0.5


# --- Budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("60MB", (6e7, False)), ("60 MiB", (60 * 2**20, False)), ("1.5kb", (1500.0, False)),
     ("2GiB", (2.0 * 2**30, False)), ("900B", (900.0, False)), ("40%", (0.4, True))],
)  # fmt: skip
def test_sizes_are_read(text, wanted):
    assert parse_size(text, "") == wanted


@pytest.mark.parametrize("text", ["", "60", "MB", "-5MB", "0MB", "5iB", "60 MB or so", "1e3MB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(UserInputError, match="allocate-budget: size is .*as in 60MB"):
        AllocateBudget(size=text)


def test_a_budget_is_one_of_three():
    with pytest.raises(UserInputError, match="none is given"):
        AllocateBudget()
    with pytest.raises(UserInputError, match="size and nonzeros are given"):
        AllocateBudget(size="40%", nonzeros=5)
    with pytest.raises(UserInputError, match="size and latency are given"):
        AllocateBudget(size="40%", latency="2x")


@pytest.mark.parametrize("step", [AllocateOWL, AllocateFisher])
def test_n_of_m_leaves_nothing_to_distribute(step):
    with pytest.raises(UserInputError, match="pattern 2:4 .*use allocate-uniform"):
        step(pattern="2:4")
    with pytest.raises(UserInputError, match="pattern 2:4"):
        AllocateBudget(size="40%", pattern="2:4")


def test_only_some_budgets_need_data():
    assert not AllocateBudget(size="40%").needs_data
    assert AllocateBudget(size="40%", within="owl").needs_data


def test_stored_bytes_take_the_smaller_form():
    assert index_bytes(128) == 1
    assert index_bytes(1 << 14) == pytest.approx((128 + 2 * (16384 - 128)) / 16384)
    size = 1 << 14
    dense = stored_bytes(size, size, 4)
    assert dense == pytest.approx(4 * size, rel=0.01)
    assert stored_bytes(size, size * 0.9, 4) == dense
    assert stored_bytes(size, size * 0.1, 4) == pytest.approx(0.1 * size * 5.99, rel=0.01)
    assert stored_bytes(200, 0, 4) > 800  # too small to be sparse
    assert size_text(61_234_567) == "61.2 MB"


def test_the_fewest_zeros_are_found():
    parts = [Pieces(50, 1), Pieces(70, 1)]

    def cost(zeros):
        return 1000 - 3 * sum(zeros)

    assert fewest_zeros(cost, evenly(parts), 800, 100) == 67
    assert fewest_zeros(cost, evenly(parts), 1000, 100) == 0
    assert fewest_zeros(cost, evenly(parts), 600, 100) is None


@pytest.mark.parametrize("within", ["uniform", "fisher", "owl"])
def test_a_number_of_nonzeros_is_met_exactly(make_family, batches, within):
    model = make_family("llama")
    step = AllocateBudget(nonzeros=25_000, within=within)
    program = elsa_compile.apply(model, step, PruneMagnitude(), data=batches)
    assert sum(int(p.count_nonzero()) for p in model.parameters()) == 25_000
    assert program.history[0].stats.counts["nonzeros"] == 25_000


def test_smaller_budgets_are_sparser(traced):
    found = []
    for size in ("200%", "90%", "75%", "65%"):
        program = elsa_compile.apply(traced, AllocateBudget(size=size))
        found.append(program.history[-1].stats.counts["sparsity"])
    assert found[0] == 0
    assert found == sorted(found)


def test_a_budget_that_cannot_be_met_says_what_can(traced):
    with pytest.raises(UserInputError, match=r"1 kB cannot be reached: with 99.00% .* about 1\d+"):
        elsa_compile.apply(traced, AllocateBudget(size="1kB"))
    with pytest.raises(UserInputError, match=r"100 nonzeros cannot .*21,\d+ stay; .*raise limit"):
        elsa_compile.apply(traced, AllocateBudget(nonzeros=100, limit=0.9))


def test_the_predicted_size_is_that_of_the_file(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        )
    ).eval()  # fmt: skip
    recipe = elsa_compile.Recipe((AllocateBudget(size="600kB"), PruneMagnitude()))
    result = elsa_compile.compile(model, tmp_path / "model.onnx", recipe)
    predicted = result.program.history[0].stats.counts["predicted_bytes"]
    real = result.path.stat().st_size
    assert predicted == pytest.approx(real, rel=0.03)
    assert real == pytest.approx(600_000, rel=0.03)


# --- Plans ------------------------------------------------------------------------------------

STEPS = [
    AllocateOWL(sparsity=0.73),
    AllocateFisher(sparsity=0.73),
    AllocateBudget(nonzeros=25_000, within="fisher"),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_the_plan_file_gives_the_same_plan_back(traced, batches, tmp_path, step):
    program = elsa_compile.apply(traced, step, data=batches)
    wanted, before = plan_to_yaml(program), dict(program.plans)
    (tmp_path / "plan.yaml").write_text(wanted, encoding="utf-8")
    elsa_compile.apply(program, AllocatePlan(path=str(tmp_path / "plan.yaml")))
    assert program.plans == before
    assert plan_to_yaml(program) == wanted


@pytest.mark.parametrize("step", [*STEPS, AllocateUniform(sparsity=0.73)], ids=lambda s: s.name)
def test_the_shares_of_body_and_model_are_counted(traced, batches, step):
    program = elsa_compile.apply(traced, step, data=batches)
    counts = program.history[-1].stats.counts
    zeros = zeros_planned(program)
    whole = program.parameters()
    assert counts["share_of_model"] == pytest.approx(zeros / whole)
    assert counts["share_of_body"] == pytest.approx(zeros / (whole - 2 * 300 * 32))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_an_estimate_without_data_plans_evenly_and_says_so(traced, step):
    stats = step.run(traced, Context(None, torch.device("cpu"), 0, Silent()))
    assert any("without data" in note for note in stats.notes)
    sparsities = [p.sparsity for p in traced.plans.values() if p.skipped is None]
    assert max(sparsities) - min(sparsities) < 0.01


@pytest.mark.parametrize("step", [AllocateOWL, AllocateFisher])
def test_targets_and_ignore_are_those_of_allocate_uniform(traced, batches, step):
    chosen = step(sparsity=0.5, targets=["re:.*mlp.*"], ignore=["re:.*layers\\.0.*"])
    program = elsa_compile.apply(traced, chosen, data=batches)
    planned = [name for name, plan in program.plans.items() if plan.skipped is None]
    assert planned == [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    with pytest.raises(UserInputError, match=f"{step.name}: ignore: .*matches no weight"):
        elsa_compile.apply(traced, step(ignore=["re:.*mpl.*"]), data=batches)
