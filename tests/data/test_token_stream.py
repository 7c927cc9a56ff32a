"""Windows of a corpus: order, resuming, what is held out, and the cache of tokens."""

import json
import random
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from elsa_compile import token_cache
from elsa_compile.errors import UserInputError
from elsa_compile.progress import Silent
from elsa_compile.row_order import held_out_count, permuted
from elsa_compile.runtime import text
from elsa_compile.token_stream import TokenBatches, TokenStream, text_stream


@pytest.fixture
def program(tokenizer_folder):
    """What a stream needs of a program."""
    return SimpleNamespace(
        folder=tokenizer_folder,
        source="tiny",
        config={"vocab_size": 300, "max_position_embeddings": 128},
    )


def numbered(count=1000, seq_len=10, **options):
    """A stream whose tokens say where they come from."""
    return TokenStream(np.arange(count, dtype=np.uint16), seq_len, **options)


# --- Order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000])
def test_a_permutation_hits_everything_once(count):
    for key in (0, 1, -5, 1 << 70):
        assert sorted(permuted(i, count, key) for i in range(count)) == list(range(count))


def test_permutations_look_random():
    """Every place is equally likely, within 5 standard deviations of a binomial."""
    keys, count = 4000, 8
    hits = np.zeros((count, count))
    for key in range(keys):
        for index in range(count):
            hits[index, permuted(index, count, key)] += 1
    expected = keys / count
    assert abs(hits - expected).max() < 5 * (expected * (1 - 1 / count)) ** 0.5
    order = [permuted(i, 10**9, 3) for i in range(1000)]
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.15


def test_the_order_never_changes_between_versions():
    """A run that was started with an older release goes on with the same batches."""
    assert [permuted(i, 10, 7) for i in range(10)] == [4, 2, 3, 6, 8, 9, 7, 0, 1, 5]


@pytest.mark.parametrize(
    ("total", "kept"), [(1, 0), (2, 1), (10, 5), (16, 8), (100, 8), (3000, 30), (10**6, 64)]
)
def test_how_much_is_held_out(total, kept):
    assert held_out_count(total) == kept


# --- Windows --------------------------------------------------------------------------------


def test_a_batch_depends_on_the_step_alone():
    steps = [numbered().batch(step, 7) for step in range(40)]
    stream = numbered()
    for step in random.Random(0).choices(range(40), k=60):
        assert stream.batch(step, 7).equal(steps[step])
    assert steps[0].dtype == torch.int64
    assert steps[0].shape == (7, 10)
    halves = torch.cat([stream.batch(0, 3), stream.batch(1, 3), stream.batch(2, 3)])
    assert halves[:7].equal(steps[0])


def test_another_seed_is_another_order():
    assert not numbered(seed=1).batch(0, 7).equal(numbered(seed=2).batch(0, 7))
    assert numbered(seed=1).held_out().equal(numbered(seed=2).held_out())


@pytest.mark.parametrize("bos", [None, 999])
def test_every_epoch_draws_every_training_token_once(bos):
    stream = numbered(1003, 10, bos_id=bos)
    taken = 10 if bos is None else 9
    assert stream.windows == 1003 // taken - held_out_count(1003 // taken)
    seen = []
    for epoch in range(5):
        drawn = torch.cat(
            [stream.batch(epoch * stream.windows + i, 1) for i in range(stream.windows)]
        )
        if bos is not None:
            assert (drawn[:, 0] == bos).all()
            drawn = drawn[:, 1:]
        assert sorted(drawn.flatten().tolist()) == list(range(stream.windows * taken))
        seen.append(drawn)
    firsts = [set((drawn[:, 0] % taken).tolist()) for drawn in seen]
    assert len({min(first) for first in firsts}) > 1, "epochs begin their windows elsewhere"
    orders = [(drawn[:, 0] // taken).tolist() for drawn in seen]
    assert orders[0] != orders[1]


def test_what_is_held_out_is_never_drawn():
    for count in (40, 100, 1000, 5003):
        stream = numbered(count, 10)
        kept = stream.held_out()
        assert kept.shape == (held_out_count(count // 10), 10)
        assert kept.flatten().tolist() == list(range(stream.windows * 10, count // 10 * 10))
        for step in range(4 * stream.windows // 8 + 1):
            assert int(stream.batch(step, 8).max()) < int(kept.min())


def test_windows_are_whole_but_at_the_seam():
    stream = numbered()
    drawn = stream.batch(0, stream.windows)
    broken = (drawn.diff(dim=1) != 1).any(dim=1)
    assert int(broken.sum()) <= 1


def test_a_text_of_one_window_trains_on_it():
    stream = numbered(19, 10)
    assert stream.windows == 1
    assert stream.held_out().shape == (0, 10)
    assert stream.batch(3, 2).shape == (2, 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: numbered(9, 10), "holds 9 tokens, wanted at least 10"),
        (lambda: numbered(9, 1), "the window is 1, wanted at least 2"),
        (lambda: numbered().batch(-1, 2), "step -1"),
        (lambda: numbered().batch(0, 0), "batch size 0"),
    ],
)
def test_numbers_that_make_no_sense(make, words):
    with pytest.raises(UserInputError, match=words):
        make()


# --- Text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", ["no", "yes"])
def test_held_out_windows_are_those_of_evaluation(bos, program, text_file, tmp_path):
    stream: TokenBatches = text_stream(program, text_file, 16, bos=bos, cache=tmp_path)
    tokenizer = text.Tokenizer(program.folder)
    ids = tokenizer.encode(text.read_text(text_file))
    cut = text.windows(ids, 16, None, text.bos_token(tokenizer, bos))
    assert stream.held_out().tolist() == cut[-len(stream.held_out()) :].tolist()


@pytest.mark.parametrize("ending", ["\n", "\n\n", " "], ids=["lines", "paragraphs", "one line"])
def test_pieces_give_the_tokens_of_the_whole_text(
    ending, program, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_cache, "_PIECE", 300)
    monkeypatch.setattr(token_cache, "_BATCH", 2000)
    path = tmp_path / "t.txt"
    path.write_text(ending.join(text_file.read_text().splitlines()))
    stream = text_stream(program, path, 16)
    assert (
        stream.tokens.tolist() == text.Tokenizer(program.folder).encode(path.read_text()).tolist()
    )


def test_eos_between_documents(program, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_PIECE", 20)
    path = tmp_path / "t.jsonl"
    texts = ["one two three four five six seven\neight nine ten", "x\n", "last"] * 20
    path.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    stream = text_stream(program, path, 16, separate=True, text_field="body")
    assert (np.array(stream.tokens) == 1).sum() == 60
    ids, last = [], stream.tokens.tolist()
    while last:
        ids.append(last[: last.index(1)])
        last = last[last.index(1) + 1 :]
    tokenizer = text.Tokenizer(program.folder)
    assert [tokenizer.decode(one) for one in ids] == [t.rstrip("\n") for t in texts]
    assert 1 not in text_stream(program, path, 16, text_field="body").tokens


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"folder": None}, {}, "text needs the model's tokenizer"),
        ({"config": {"vocab_size": 100}}, {}, "the model knows 100"),
        ({}, {"seq_len": 129}, "the window is 129, but the model takes at most 128"),
        ({}, {"bos": "maybe"}, "wanted auto, yes or no"),
        ({}, {"cache": "/dev/null/x"}, "token cache /dev/null/x cannot be written"),
    ],
)
def test_what_a_stream_refuses(change, options, words, program, text_file):
    asked = SimpleNamespace(**{**vars(program), **change})
    if "cache" in options:
        options = {"cache": token_cache.Path(options["cache"])}
    with pytest.raises(UserInputError, match=words):
        text_stream(asked, text_file, **options)


def test_a_corpus_that_cannot_be_read(program, tmp_path):
    with pytest.raises(UserInputError, match="does not exist"):
        text_stream(program, tmp_path / "none.txt")
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\nrubbish')
    cache = tmp_path / "cache"
    with pytest.raises(UserInputError, match="line 2"):
        text_stream(program, path, cache=cache)
    assert list(cache.iterdir()) == []


# --- Cache ----------------------------------------------------------------------------------


class Counting(Silent):
    """Counts how often a corpus is tokenised."""

    built = 0

    def stage_started(self, stage):
        assert stage.name == "tokenise"
        self.built += 1


@pytest.fixture
def opened(program, text_file, tmp_path):
    """Open the stream with one cache; returns it and how often the cache was built by then."""
    path = tmp_path / "t.txt"
    path.write_text(text_file.read_text())
    sink = Counting()

    def open_stream(**options):
        stream = text_stream(program, path, 16, cache=tmp_path / "cache", progress=sink, **options)
        return stream, sink.built

    open_stream.path = path
    open_stream.cache = tmp_path / "cache"
    return open_stream


def test_the_cache_is_reused_until_something_changes(opened):
    first, built = opened()
    assert built == 1
    assert first.tokens.dtype == np.uint16
    again, built = opened(seed=3, bos="yes")
    assert built == 1, "neither seed nor BOS are in the tokens"
    assert again.tokens.tolist() == first.tokens.tolist()
    assert opened(separate=True)[1] == 2
    opened.path.write_text(opened.path.read_text() + "More.\n")
    longer, built = opened()
    assert built == 3
    assert len(longer.tokens) > len(first.tokens)


DAMAGE = {
    "truncated": lambda tokens, meta: tokens.write_bytes(tokens.read_bytes()[:-2]),
    "longer": lambda tokens, meta: tokens.write_bytes(tokens.read_bytes() + b"\0\0"),
    "flipped": lambda tokens, meta: tokens.write_bytes(
        bytes([tokens.read_bytes()[0] ^ 1]) + tokens.read_bytes()[1:]
    ),
    "missing": lambda tokens, meta: tokens.unlink(),
    "no description": lambda tokens, meta: meta.unlink(),
    "no JSON": lambda tokens, meta: meta.write_text("{"),
    "a list": lambda tokens, meta: meta.write_text("[1]"),
    "other type": lambda tokens, meta: meta.write_text(meta.read_text().replace("<u2", "<f8")),
    "huge": lambda tokens, meta: meta.write_text('{"count": 1e999, "dtype": "<u2"}'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache_is_built_again(name, opened):
    wanted = opened()[0].batch(0, 8)
    tokens, meta = next(opened.cache.glob("*.tokens")), next(opened.cache.glob("*.json"))
    DAMAGE[name](tokens, meta)
    found, built = opened()
    assert built == 2
    assert found.batch(0, 8).equal(wanted)
    assert sorted(p.name for p in opened.cache.iterdir()) == sorted([tokens.name, meta.name])


def test_a_temporary_cache_goes_with_its_stream(program, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache.tempfile, "tempdir", str(tmp_path))
    stream = text_stream(program, text_file, 16)
    assert len(list(tmp_path.iterdir())) == 1
    assert stream.batch(0, 2).shape == (2, 16)
    del stream
    assert list(tmp_path.iterdir()) == []


# --- Memory ---------------------------------------------------------------------------------


def peak_bytes(program, path, cache):
    """Peak of what Python and numpy allocate while a corpus is tokenised and read."""
    tracemalloc.start()
    stream = text_stream(program, path, 64, cache=cache)
    for step in range(20):
        stream.batch(step, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, len(stream.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["documents", "lines", "one line", "json"])
def test_memory_does_not_grow_with_the_corpus(kind, program, tmp_path):
    """50 MB; the text alone would be more than the bound. About 30 s each."""
    ends = {"documents": "\n\n", "lines": "\n", "one line": " ", "json": ""}
    peaks = []
    for mb in (5, 50):
        path = tmp_path / f"{mb}.{'jsonl' if kind == 'json' else 'txt'}"
        sentence = "the old king saw every ship and a small town crossed the river" + ends[kind]
        unit = sentence * 15 if kind != "json" else json.dumps({"text": sentence * 15}) + "\n"
        with path.open("w") as file:
            for _ in range(mb * 1_000_000 // len(unit)):
                file.write(unit)
        peak, tokens = peak_bytes(program, path, tmp_path / f"cache-{mb}")
        assert tokens > mb * 100_000
        peaks.append(peak)
    assert peaks[1] < 40e6
    assert peaks[1] < peaks[0] * 1.3
