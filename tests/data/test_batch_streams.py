"""Training batches from Python iterables, and rows of named inputs."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from elsa_compile.batch_streams import python_stream, sample_stream
from elsa_compile.data import Samples
from elsa_compile.errors import UserInputError
from elsa_compile.row_order import held_out_count

ROWS = torch.arange(24).reshape(6, 4)


class Mapping(dict):
    """As tokenizers give their batches."""


SOURCES = {
    "tensor": lambda: ROWS,
    "rows": lambda: list(ROWS),
    "batches": lambda: [ROWS[:1], ROWS[1:5], ROWS[5:]],
    "int32": lambda: [ROWS.int()],
    "dicts": lambda: [{"input_ids": ROWS[:2], "attention_mask": torch.ones(2, 4)},
                      Mapping(input_ids=ROWS[2:])],
    "loader": lambda: DataLoader(ROWS, batch_size=4),
    "dataset": lambda: DataLoader(TensorDataset(ROWS), batch_size=4),
    "one empty": lambda: [ROWS[:0], ROWS],
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_batches_are_cut_anew_and_epochs_follow_each_other(name):
    stream = python_stream(SOURCES[name]())
    for step in (0, 1, 2, 7, 3, 3, 0):
        wanted = [(step * 5 + i) % 6 for i in range(5)]
        found = stream.batch(step, 5)
        assert found.equal(ROWS[wanted])
        assert found.dtype == torch.int64
    assert stream.held_out() is None


def test_a_generator_serves_one_epoch_forwards():
    stream = python_stream(row for row in ROWS)
    assert stream.batch(0, 2).equal(ROWS[:2])
    assert stream.batch(2, 2).equal(ROWS[4:])
    with pytest.raises(UserInputError, match="cannot start again, and it is exhausted after 6"):
        stream.batch(3, 2)
    stream = python_stream(iter([ROWS]))
    stream.batch(1, 2)
    with pytest.raises(UserInputError, match="an earlier step is asked for after 4 rows"):
        stream.batch(0, 2)


BAD = {
    "empty": ([], "data is empty"),
    "empty batches": ([ROWS[:0]], "data is empty"),
    "float": ([ROWS.float()], "float32, wanted token ids"),
    "bool": ([ROWS > 3], "bool, wanted token ids"),
    "deep": ([ROWS[None]], r"a tensor \(1, 6, 4\)"),
    "scalar": ([ROWS[0, 0]], r"a tensor \(\)"),
    "narrow": ([ROWS[:, :1]], "S of at least 2"),
    "ragged": ([ROWS, ROWS[:, :3]], "rows of 4 and of 3 tokens, wanted one length"),
    "text": (["a text"], "data holds a str"),
    "none": ([None], "data holds a NoneType"),
    "no ids": ([{"labels": ROWS}], "data holds a dict"),
    "negative": ([ROWS - 1], "token -1"),
    "large": ([ROWS + 10], "token 33, but the model knows 0 to 29"),
    "padded": ([{"input_ids": ROWS, "attention_mask": ROWS > 2}], "data is padded"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_of_another_kind(name):
    batches, words = BAD[name]
    with pytest.raises(UserInputError, match=words):
        python_stream(batches, vocab_size=30).batch(1, 6)


# --- Named inputs ---------------------------------------------------------------------------


def samples(*sizes):
    """Samples whose rows are numbered from 0."""
    first, found = 0, []
    for size in sizes:
        rows = torch.arange(first, first + size)
        found.append({"image": rows[:, None].repeat(1, 3).float(), "label": rows})
        first += size
    return Samples(tuple(found), "made up")


@pytest.mark.parametrize("sizes", [(1,) * 40, (40,), (7, 30, 1, 2)])
def test_rows_are_drawn_once_an_epoch_and_never_the_held_out(sizes):
    stream = sample_stream(samples(*sizes), seed=5)
    assert stream.rows == 40 - held_out_count(40)
    kept = set(stream.held_out()["label"].tolist())
    assert len(kept) == 8
    assert kept != set(range(32, 40)), "data often come sorted by class"
    orders = []
    for epoch in range(3):
        drawn = [stream.batch(epoch * 4 + i, 8) for i in range(4)]
        labels = torch.cat([row["label"] for row in drawn])
        assert torch.cat([row["image"] for row in drawn])[:, 2].equal(labels.float())
        assert set(labels.tolist()) == set(range(40)) - kept
        orders.append(labels.tolist())
    assert orders[0] != orders[1]
    again = sample_stream(samples(*sizes), seed=5).batch(9, 8)
    assert again["label"].tolist() == orders[2][8:16]
    assert set(sample_stream(samples(*sizes), seed=6).held_out()["label"].tolist()) == kept


def test_a_single_row():
    stream = sample_stream(samples(1))
    assert stream.batch(0, 3)["image"].shape == (3, 3)
    assert stream.held_out() is None


BAD_SAMPLES = {
    "none": ((), "data is empty"),
    "no rows": (({"x": torch.ones(0, 2)},), "data is empty"),
    "a number": (({"x": torch.tensor(1.0)},), "data is empty"),
    "rows differ": (({"x": torch.ones(2), "y": torch.ones(3)},), r"hold \[2, 3\] rows"),
    "shapes differ": (({"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}), "samples differ"),
    "names differ": (({"x": torch.ones(2)}, {"y": torch.ones(2)}), "samples differ"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_samples_that_make_no_batch(name):
    inputs, words = BAD_SAMPLES[name]
    with pytest.raises(UserInputError, match=words):
        sample_stream(Samples(inputs, "made up"))
