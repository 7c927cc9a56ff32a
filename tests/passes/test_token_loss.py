"""Loss and gradient against autograd on float64 logits."""

import pytest
import torch
from torch.nn import functional

from elsa_compile.passes import token_loss as module
from elsa_compile.passes.objective import Trust
from elsa_compile.passes.token_loss import token_loss


def plain(scores, ids, dense, share):
    """The same by autograd."""
    loss = scores.new_zeros(())
    if ids is not None:
        loss = (1 - share) * functional.cross_entropy(
            scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
    if dense is not None:
        divergence = functional.kl_div(
            scores.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True
        )
        loss = loss + share * divergence.sum(-1).mean()
    return loss


@pytest.mark.parametrize("entries", [64, 1 << 22], ids=["chunks", "whole"])
@pytest.mark.parametrize(
    ("with_ids", "with_dense", "share"),
    [(True, False, 0.0), (False, True, 1.0), (True, True, 0.3), (True, True, 0.0)],
)
def test_loss_and_gradient_are_those_of_autograd(monkeypatch, entries, with_ids, with_dense, share):
    monkeypatch.setattr(module, "_ENTRIES", entries)
    torch.manual_seed(0)
    scores = (3 * torch.randn(3, 7, 19)).requires_grad_()
    dense = 3 * torch.randn(3, 7, 19) if with_dense else None
    ids = torch.randint(0, 19, (3, 7)) if with_ids else None
    wanted = scores.detach().double().requires_grad_()
    reference = plain(wanted, ids, None if dense is None else dense.double(), share)
    (2 * reference).backward()

    loss, costs = token_loss(scores, ids, dense, share)
    (2 * loss).backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(scores.grad, wanted.grad.float(), rtol=1e-4, atol=1e-6)
    if ids is not None and dense is not None:
        both = [plain(t.double(), ids, None, 0.0) for t in (scores.detach(), dense)]
        assert costs[:2].tolist() == pytest.approx([float(t) for t in both], rel=1e-5)
        divergence = plain(scores.detach().double(), None, dense.double(), 1.0)
        assert float(costs[2]) == pytest.approx(float(divergence), rel=1e-5)


def test_rows_of_class_scores_distil_too():
    scores = torch.randn(4, 5, requires_grad=True)
    loss, _ = token_loss(scores, None, torch.randn(4, 5), 1.0)
    loss.backward()
    assert scores.grad is not None
    assert float(loss) > 0


def test_trust_is_the_part_of_the_divergence_that_is_error():
    torch.manual_seed(0)
    dense = 2 * torch.randn(1, 1, 6).expand(1, 20001, 6)
    ids = torch.multinomial(dense[0, 0].softmax(-1), 20001, replacement=True)[None]
    worse = 2 * torch.randn(1, 1, 6).expand(1, 20001, 6)
    _, costs = token_loss(worse, ids, dense, 0.5)
    right = Trust(float(costs[0] - costs[1]), float(costs[2]))
    assert right.value() == pytest.approx(1.0, abs=0.03)  # text drawn from the dense model
    _, costs = token_loss(dense, ids, worse, 0.5)
    wrong = Trust(float(costs[0] - costs[1]), float(costs[2]))
    assert wrong.value() == 0.0  # the trained model is the better one
