"""repair-degenerate: empty rows are reported, and refilled without breaking the mask."""

import pytest
import torch

from elsa_compile import apply, facts, frontend
from elsa_compile.facts import Fact
from elsa_compile.passes import AllocateUniform, PruneMagnitude, RepairDegenerate
from elsa_compile.passes.repair_degenerate import refill

UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def program(make_family):
    """Magnitude pruning empties rows 3 and 5 of one weight."""
    program = frontend.from_module(make_family("llama"))
    with torch.no_grad():
        program.weights[UP].parameter[[3, 5]] *= 1e-3
    return apply(program, AllocateUniform(sparsity=0.5), PruneMagnitude())


def test_a_refilled_row_takes_the_place_of_the_smallest_entry():
    matrix = torch.tensor([[5.0, 4.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    found = (torch.tensor([1]), torch.tensor([2]), torch.tensor([-0.25]))
    new, mask, gone = refill(matrix, matrix != 0, found)
    # 0.5 is smaller than 1.0 but the only entry of its row
    assert new.tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, -0.25], [0.0, 0.5, 0.0]]
    assert mask.equal(new != 0)
    assert gone == 1


def test_empty_rows_are_reported_and_left(program):
    before = program.weights[UP].parameter.detach().clone()
    apply(program, RepairDegenerate())
    stats = program.history[-1].stats
    assert stats.counts["empty_rows"] == 2
    assert stats.notes == [f"{UP}: 2 of 64 rows are empty"]
    assert stats.changed == 0
    assert torch.equal(program.weights[UP].parameter, before)


def test_restored_rows_hold_what_was_their_largest_entry(make_family, program):
    dense = frontend.from_module(make_family("llama")).weights[UP].parameter.detach()
    zeros = int((program.weights[UP].parameter == 0).sum())
    apply(program, RepairDegenerate(restore=True))
    after, plan = program.weights[UP].parameter.detach(), program.plans[UP]
    for row in (3, 5):
        column = int(dense[row].abs().argmax())
        assert after[row].nonzero().tolist() == [[column]]
        assert float(after[row, column]) == pytest.approx(1e-3 * float(dense[row, column]))
    assert int((after == 0).sum()) == zeros
    assert plan.mask.equal(after != 0)
    facts.check(program, Fact.MASKED)
    assert "2 rows have their largest entry back, 2 smallest" in program.history[-1].stats.notes[1]
    apply(program, RepairDegenerate(restore=True))
    assert program.history[-1].stats.changed == 0


def test_pruning_again_does_not_forget_what_the_rows_held(program):
    apply(program, PruneMagnitude(), RepairDegenerate(restore=True))
    assert program.history[-1].stats.changed == 2


def test_a_layer_without_entries_is_a_warning(program):
    program.weights[GATE].parameter.data.zero_()
    apply(program, RepairDegenerate(restore=True))
    stats = program.history[-1].stats
    assert stats.counts["empty_weights"] == 1
    assert stats.warnings == [f"{GATE} has no entry left: the layer gives nothing"]
    assert f"{GATE}: not restored, since nothing is known" in " ".join(stats.notes)


def test_a_weight_emptied_by_its_plan_gets_an_entry_in_every_row(make_family):
    program = frontend.from_module(make_family("llama"))
    apply(program, AllocateUniform(sparsity=0.9999), PruneMagnitude())
    assert not program.weights[UP].parameter.any()
    apply(program, RepairDegenerate(restore=True))
    assert bool((program.weights[UP].parameter != 0).sum(1).eq(1).all())
    assert program.plans[UP].sparsity == pytest.approx(31 / 32, abs=1e-3)
    facts.check(program, Fact.MASKED)


def test_a_pattern_that_leaves_no_choice_is_refused(make_family):
    program = frontend.from_module(make_family("llama"))
    with torch.no_grad():
        program.weights[UP].parameter[:4] *= 1e-3
    apply(program, AllocateUniform(sparsity=0.5, pattern="4x4"), PruneMagnitude())
    apply(program, RepairDegenerate(restore=True))
    assert "the pattern 4x4 leaves no choice" in " ".join(program.history[-1].stats.notes)
    assert program.history[-1].stats.changed == 0
