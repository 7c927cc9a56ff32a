"""The mathematics of prune-elsa on small matrices."""

import pytest
import torch

from elsa_compile.passes import admm
from elsa_compile.patterns import NM, Block, Unstructured


def textbook(weight, z, u, moment, sparsity, pattern, ratio):
    """The two-tensor form: z = project(w + u), u = w + u - z, u rescaled as lam changes."""
    a = weight + u
    mask = pattern.keep_mask(moment * a.square(), sparsity)
    z = torch.where(mask, a, 0)
    return z, (a - z) * ratio


@pytest.mark.parametrize(
    "pattern", [Unstructured(), Unstructured(per_row=True), NM(2, 4), Block(2, 2)]
)
def test_the_merged_state_equals_the_two_tensor_form_bit_for_bit(pattern):
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    sparsity = pattern.implied_sparsity() or 0.75
    mask = pattern.keep_mask(weight.square(), sparsity)
    z, u = torch.where(mask, weight, 0), torch.zeros_like(weight)
    target = admm.initial_target(weight, mask)
    for step in range(20):
        gradient = torch.randn_like(weight)
        moment = torch.rand_like(weight)
        lam, ratio = 0.1 * (step + 1), (step + 1) / (step + 2)
        assert torch.equal(lam * (weight - target), lam * (weight - (z - u)))
        weight = weight - 0.05 * (gradient + lam * (weight - target))
        z, u = textbook(weight, z, u, moment, sparsity, pattern, ratio)
        accumulation = admm.accumulated(weight, target, mask)
        mask = admm.project(admm.importance(accumulation, moment, "objective"), sparsity, pattern)
        target = admm.split(accumulation, mask, ratio)
        assert torch.equal(torch.where(mask, target, 0), z)
        assert torch.equal(torch.where(mask, 0, -target), u)
        assert not bool(((z != 0) & (u != 0)).any())


def test_admm_solves_a_problem_whose_answer_is_known():
    """min ||w - b||^2 with k entries: the k largest of b."""
    b = torch.tensor([[3.0, -0.1, 2.0, 0.2, -4.0, 0.3, 0.05, 1.0]])
    weight, mask = b.clone(), Unstructured().keep_mask(b.square(), 0.625)
    target = admm.initial_target(weight, mask)
    for _ in range(200):
        weight = (2 * b + 1.0 * target) / 3.0  # argmin ||w - b||^2 + lam / 2 ||w - t||^2, lam = 2
        accumulation = admm.accumulated(weight, target, mask)
        mask = admm.project(admm.importance(accumulation, None, "euclidean"), 0.625, Unstructured())
        target = admm.split(accumulation, mask)
    assert mask.tolist() == [[True, False, True, False, True, False, False, False]]
    gap, size = admm.primal_residual(weight, target, mask)
    assert (gap / size) ** 0.5 < 1e-3
    torch.testing.assert_close(
        torch.where(mask, target, 0), torch.where(mask, b, 0), atol=1e-3, rtol=0
    )


def test_the_objective_aware_projection_keeps_small_weights_that_matter():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    moment = torch.tensor([[100.0, 1.0, 1.0, 1.0]])
    by_objective = admm.importance(weight, moment, "objective")
    assert Unstructured().keep_mask(by_objective, 0.5).tolist() == [[True, False, False, True]]
    by_size = admm.importance(weight, moment, "euclidean")
    assert Unstructured().keep_mask(by_size, 0.5).tolist() == [[False, False, True, True]]


def test_ties_are_broken_by_position_and_counts_are_exact():
    scores = torch.zeros(4, 10)  # 8-bit moments have many exact zeros
    mask = admm.project(scores, 0.7, Unstructured())
    assert int(mask.sum()) == 12
    assert mask.view(-1)[:12].all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 129)])
def test_packed_masks_come_back(shape):
    mask = torch.rand(shape) < 0.3
    packed = admm.pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(admm.unpack_mask(packed, mask.shape), mask)


def test_schedules():
    assert [admm.penalty_share("cosine", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.5, 1])
    assert [admm.penalty_share("linear", p) for p in (0.0, 0.25, 2.0)] == [0.0, 0.25, 1.0]
    assert admm.penalty_share("constant", 0.0) == 1.0
    assert [admm.annealed_sparsity(0.9, p, 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [0.0, 1 - 0.1**0.5, 0.9, 0.9]
    )
    assert admm.annealed_sparsity(0.9, 0.0, 0.0) == 0.9


def test_an_interval_closes_the_share_it_is_told():
    step = admm.pull(0.8, 32)
    assert (1 - step) ** 32 == pytest.approx(0.2)
    assert admm.pull(0.0, 32) == 0.0


def test_churn_counts_changed_entries():
    old = torch.tensor([[True, True, False, False]])
    new = torch.tensor([[True, False, True, False]])
    assert admm.churn(old, new) == 2
