"""Reading documents: every format, and every way in which a file can be bad."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from elsa_compile import cli, compiler, data
from elsa_compile import documents as module
from elsa_compile.documents import check_source, documents, head
from elsa_compile.errors import UserInputError
from elsa_compile.recipe import Recipe
from elsa_compile.runtime import text

datasets.disable_progress_bars()


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def program(tokenizer_folder):
    """What reading text needs of a program."""
    return SimpleNamespace(
        folder=tokenizer_folder,
        source="tiny",
        kind="decoder",
        config={"vocab_size": 300, "max_position_embeddings": 128},
    )


# --- Plain text -----------------------------------------------------------------------------

PLAIN = {
    "a\nb\n\nc": ["a\nb\n\n", "c"],
    "\n\n a\n": ["\n\n a\n"],
    "a\n \t\n\n\nb\n\n": ["a\n \t\n\n\n", "b\n\n"],
    "a\r\n\r\nb": ["a\r\n\r\n", "b"],
    "a": ["a"],
}


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("content", PLAIN, ids=repr)
def test_blank_lines_close_documents_wherever_a_block_ends(content, block, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    path = tmp_path / "t.txt"
    path.write_bytes(content.encode())
    assert list(documents(path)) == PLAIN[content]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_together_are_the_text_that_evaluation_reads(block, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "Ä ö\n\n \n𝄞 x\r\n\ny\n".encode())
    assert "".join(documents(path)) == text.read_text(path)


def test_a_text_without_blank_lines_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DOCUMENT", 100)
    path = tmp_path / "t.txt"
    path.write_text("one two three\n" * 50 + "x" * 250)
    found = list(documents(path))
    assert "".join(found) == path.read_text()
    assert max(map(len, found)) <= 100
    assert found[0].endswith("three\n")


BAD_TEXT = {
    "empty": (b"", "t.txt is empty; give"),
    "blank": (b" \n\n\n", "t.txt is empty; give"),
    "not-utf8": (b"abc\n\xff\xfe", r"t.txt is not UTF-8 text \(byte 0xff at offset 4\)"),
    "half-a-character": (b"abc\xc3", r"t.txt is not UTF-8 text \(byte 0xc3 at offset 3\)"),
    "binary": (b"abc\x00def", r"t.txt holds binary data \(a NUL at character 3\)"),
}


@pytest.mark.parametrize("block", [2, 1 << 20])
@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_is_refused_in_the_words_of_evaluation(name, block, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    content, words = BAD_TEXT[name]
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match=words) as found:
        list(documents(path))
    with pytest.raises(UserInputError) as wanted:
        text.read_text(path)
    assert name == "empty" or name == "blank" or str(found.value) == str(wanted.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(UserInputError, match=r"none.txt does not exist; .* datasets:NAME"):
        list(documents(tmp_path / "none.txt"))
    with pytest.raises(UserInputError, match="not a regular file"):
        list(documents("/dev/zero"))


def test_gzip(tmp_path):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"a\n\nb"))
    assert list(documents(path)) == ["a\n\n", "b"]
    path.write_bytes(gzip.compress(b"a\n\nb" * 1000)[:-12])
    with pytest.raises(UserInputError, match="not a whole gzip file"):
        list(documents(path))
    path.write_bytes(b"a\n\nb")
    with pytest.raises(UserInputError, match="not a whole gzip file"):
        list(documents(path))


# --- JSON lines -----------------------------------------------------------------------------


def test_json_lines(tmp_path):
    path = write(tmp_path / "t.jsonl", {"text": "a"}, {"text": "ä", "n": 1}, {"text": ""})
    path.write_text(path.read_text() + "\n\n")
    assert list(documents(path)) == ["a\n\n", "ä\n\n"]
    zipped = tmp_path / "t.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert list(documents(zipped)) == ["a\n\n", "ä\n\n"]
    assert list(documents(write(path, {"body": "x"}), "body")) == ["x\n\n"]


BAD_LINE = {
    "no JSON": (b"{text: 1}", "line 2 is not valid JSON .* column 2"),
    "cut off": (b'{"text": "a', "line 2 is not valid JSON"),
    "list": (b"[1]", "line 2 holds a JSON list, wanted an object"),
    "no field": (b'{"body": 1, "id": 2}', "no field 'text' .*'body', 'id'"),
    "number": (b'{"text": 1}', "field 'text' holds int, wanted text"),
    "null": (b'{"text": null}', "holds NoneType, wanted text"),
    "latin": (b'{"text": "\xe4"}', "line 2 is not UTF-8 .*0xe4"),
    "surrogate": (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "deep": (b"[" * 100_000, "line 2 "),
    "digits": (b'{"text": ' + b"1" * 5000 + b"}", "line 2 holds JSON too large"),
    "long": (b'{"text": "' + b"a" * 2000 + b'"}', "line 2 is longer than"),
}


@pytest.mark.parametrize("name", BAD_LINE)
def test_a_bad_line_is_named(name, tmp_path, monkeypatch):
    content, words = BAD_LINE[name]
    if name == "long":
        monkeypatch.setattr(module, "MAX_LINE", 1000)
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + content + b"\n")
    with pytest.raises(UserInputError, match=words) as found:
        list(documents(path))
    assert "\n" not in str(found.value)
    assert "t.jsonl" in str(found.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": " "}\n'])
def test_json_lines_without_text(content, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match=r"t.jsonl is empty"):
        list(documents(path))


# --- Datasets -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"] * 50, "n": list(range(100))})
    rows.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"validation": rows.select([1]), "train": rows.select([0])})
    splits.save_to_disk(tmp_path / "two")
    other = datasets.DatasetDict({"x": rows.select([0]), "y": rows.select([1])})
    other.save_to_disk(tmp_path / "three")
    return tmp_path


def test_a_saved_dataset(saved):
    assert list(documents(saved / "one")) == ["a\n\n", "b\n\n"] * 50
    assert list(documents(saved / "two")) == ["a\n\n"]
    assert list(documents(saved / "two" / "validation")) == ["b\n\n"]


@pytest.mark.parametrize(
    ("folder", "field", "words"),
    [
        ("one", "body", "row 1 has no field 'body' .*'text', 'n'"),
        ("one", "n", "row 1: field 'n' holds int, wanted text"),
        ("three", "text", "holds the splits x, y; give the folder of one of them, as in .*three/x"),
        (".", "text", r"no dataset written by save_to_disk \(it has no state.json\)"),
    ],
)
def test_a_saved_dataset_of_another_kind(folder, field, words, saved):
    with pytest.raises(UserInputError, match=words):
        list(documents(saved / folder, field))


def test_a_damaged_dataset(saved):
    arrow = next((saved / "one").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:40])
    with pytest.raises(UserInputError, match="cannot be read"):
        list(documents(saved / "one"))


def test_a_dataset_by_name(tmp_path):
    """A folder of files is a dataset by name too; the hub itself is not reached in tests."""
    write(tmp_path / "train.jsonl", {"text": "a"}, {"text": "b"})
    assert list(documents(f"datasets:{tmp_path}")) == ["a\n\n", "b\n\n"]
    assert list(documents(f"datasets:{tmp_path}::train")) == ["a\n\n", "b\n\n"]
    for name, words in {
        "datasets:someone/none": "dataset someone/none cannot be opened: .*and the network",
        f"datasets:{tmp_path}::test": "Bad split: test",
        "datasets:": "names no dataset",
    }.items():
        with pytest.raises(UserInputError, match=words):
            list(documents(name))
    with pytest.raises(UserInputError, match="row 1 has no field 'body'"):
        list(documents(f"datasets:{tmp_path}", "body"))


# --- Use ------------------------------------------------------------------------------------


def test_head_stops_early(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abcd"}\n' * 3 + "rubbish")
    assert head(path, 6) == "abcd\n\n"
    assert head(path, 7) == "abcd\n\n" * 2
    check_source(path)
    with pytest.raises(UserInputError, match="line 4"):
        head(path, 100)


def test_calibration_takes_every_format(program, text_file, saved):
    lines = text_file.read_text().splitlines()
    path = write(saved / "t.jsonl", *({"text": line} for line in lines))
    found = data.text_samples(program, path)
    joined = saved / "joined.txt"
    joined.write_text("".join(line + "\n\n" for line in lines))
    wanted = data.text_samples(program, joined)
    assert len(found.inputs) == len(wanted.inputs) > 10
    for a, b in zip(found.inputs, wanted.inputs, strict=True):
        assert a["input_ids"].equal(b["input_ids"])
    assert data.load_samples(program, saved / "one", 8).inputs[0]["input_ids"].shape == (1, 8)


def test_perplexity_is_of_plain_text_only(program, tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", {"text": "a"})
    with pytest.raises(UserInputError, match="measured on plain text"):
        data.text_windows(program, path)
    for command in (
        ["eval", "none", "--data", path],
        ["none", "-o", tmp_path / "m.onnx", "--eval-data", path],
    ):
        assert cli.main([*map(str, command)]) == 2
        assert "measured on plain text" in capsys.readouterr().err


def test_the_data_are_checked_before_the_model_is_loaded(tmp_path, saved):
    def check(value):
        recipe = Recipe.preset("wanda")
        output = tmp_path / "m.onnx"
        compiler.check(compiler.CompileArgs(model="none", output=output, recipe=recipe, data=value))

    rows = tmp_path / "rows"
    rows.mkdir()
    path = write(rows / "train.jsonl", {"text": "a"})
    for good in (path, saved / "one", Path(f"datasets:{rows}")):
        check(good)
    for bad in ("datasets:someone/none.npz", "none.npz", "none.jsonl", rows):
        with pytest.raises(UserInputError, match=r"cannot be opened|does not exist|no dataset"):
            check(Path(bad))


def test_a_dataset_by_name_from_the_command_line(tmp_path, capsys):
    command = ["none", "-o", str(tmp_path / "m.onnx"), "--data", "datasets:someone/none"]
    assert cli.main(command) == 2
    assert "dataset someone/none cannot be opened" in capsys.readouterr().err
