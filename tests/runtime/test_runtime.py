"""verify, eval, generate, bench and the text protocol, on a compiled model."""

import json
import math
import shutil

import numpy as np
import pytest

import elsa_compile
from elsa_compile.errors import UnsupportedModelError, UserInputError
from elsa_compile.runtime import evaluate, generate, text
from elsa_compile.runtime.cli import main
from elsa_compile.runtime.decoder import open_decoder
from elsa_compile.runtime.verify import verify


@pytest.fixture(scope="module")
def model(tmp_path_factory, llama_folder):
    """Folder of a compiled LLaMA."""
    folder = tmp_path_factory.mktemp("compiled")
    elsa_compile.compile(llama_folder, folder / "model.onnx", "magnitude", sparsity=0.6)
    return folder


@pytest.fixture(scope="module")
def decoder(model):
    return open_decoder(model, provider="cpu", threads=1)[0]


def run(capsys, *arguments):
    """elsa-run in this process with --json: (exit code, the object)."""
    code = main([*map(str, arguments), "--json", "--provider", "cpu", "--threads", "1"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out)


# --- Text -------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_drop_the_rest():
    cut = text.windows(np.arange(10), 4)
    assert cut.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_with_bos_every_window_starts_with_it():
    cut = text.windows(np.arange(10), 4, bos_id=99)
    assert cut.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]


@pytest.mark.parametrize(("window", "limit"), [(1, None), (11, None), (4, 0)])
def test_windows_that_make_no_sense_are_refused(window, limit):
    with pytest.raises(UserInputError, match="window"):
        text.windows(np.arange(10), window, limit)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert text.read_text(path) == "abc"


def test_streamed_text_equals_decoded_text(model):
    tokenizer = text.Tokenizer(model)
    sentence = "the old king: naïve – 漢字 🙂!"
    ids = tokenizer.encode(sentence)
    stream = tokenizer.stream()
    pieces = [stream.push(int(i)) for i in ids]
    assert "".join(pieces) + stream.close() == sentence
    assert all("\ufffd" not in piece for piece in pieces)


def test_bos_yes_needs_a_bos_token(tmp_path, model):
    for name in ("tokenizer.json",):
        shutil.copy(model / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserInputError, match="has no BOS token"):
        text.bos_token(text.Tokenizer(tmp_path), "yes")


# --- Perplexity -------------------------------------------------------------------------------


def test_summed_nll_of_a_uniform_guess():
    assert evaluate.summed_nll(np.zeros((3, 8)), np.array([0, 3, 7])) == pytest.approx(
        3 * math.log(8)
    )


def test_perplexity_equals_that_of_the_definition(decoder):
    """In pieces through the cache, against one run per window and a plain log-softmax."""
    random = np.random.default_rng(0)
    windows = random.integers(0, 300, (3, 40))
    total = 0.0
    for row in windows:
        logits = decoder.extend(decoder.start(), row[None])[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= logp[np.arange(39), row[1:]].sum()
    found = evaluate.perplexity(decoder, windows)
    assert found["perplexity"] == pytest.approx(math.exp(total / (3 * 39)), rel=1e-5)
    assert found["tokens"] == 3 * 39


def test_eval_states_its_protocol(model, text_file, capsys):
    code, found = run(capsys, "eval", model, "--data", text_file, "--window", 32,
                      "--max-windows", 3, "--bos", "yes")  # fmt: skip
    assert code == 0
    assert found["bos"] == 0
    assert found["tokens"] == 3 * 31
    assert "non-overlapping windows" in found["protocol"]


@pytest.mark.parametrize("content", [b"", b"\0\1\2"])
def test_eval_refuses_what_is_no_text(model, content, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes(content)
    code, found = run(capsys, "eval", model, "--data", tmp_path / "t.txt")
    assert code == 2
    assert "t.txt" in found["error"]


# --- Generation -------------------------------------------------------------------------------


def test_the_cache_gives_the_tokens_of_whole_runs(decoder):
    prompt = np.array([4, 8, 15, 16, 23])
    stream = generate.tokens(decoder, prompt)
    found = [next(stream) for _ in range(6)]
    ids = prompt
    for token in found:
        scores = decoder.extend(decoder.start(), ids[None])[0, -1]
        assert int(scores.argmax()) == token
        ids = np.append(ids, token)


def test_a_seed_fixes_what_is_sampled(model, capsys):
    arguments = ("generate", model, "--prompt", "The", "--max-new-tokens", 12, "--temperature", 2.0)
    first = run(capsys, *arguments, "--seed", 5)[1]
    again = run(capsys, *arguments, "--seed", 5)[1]
    other = run(capsys, *arguments, "--seed", 6)[1]
    assert first["text"] == again["text"] != other["text"]


def test_only_the_likeliest_are_sampled():
    scores = np.array([1.0, 5.0, 4.0, -2.0])
    random = np.random.default_rng(0)
    narrow = generate.Sampling(temperature=1.0, top_k=2)
    assert {generate.choose(scores, narrow, random) for _ in range(200)} == {1, 2}
    nucleus = generate.Sampling(temperature=1.0, top_p=0.5)
    assert {generate.choose(scores, nucleus, random) for _ in range(50)} == {1}
    assert generate.choose(scores, generate.Sampling(), random) == 1


def test_a_token_outside_of_the_vocabulary_is_refused(decoder):
    with pytest.raises(UserInputError, match="own tokenizer"):
        decoder.extend(decoder.start(), np.array([[300]]))


# --- Verify -----------------------------------------------------------------------------------


def test_verify_passes_every_check(model):
    result = verify(model, provider="cpu")
    assert result.ok
    assert [c.name for c in result.checks if c.ok] == [
        "structure", "loads", "finite", "cache", "batch", "reference",
    ]  # fmt: skip


def test_verify_fails_for_a_file_with_other_weights(model, make_family, tmp_path, capsys):
    """Same architecture, other pruning: the recorded answers do not fit."""
    other = tmp_path / "other"
    elsa_compile.compile(
        make_family("llama"), other / "model.onnx", "magnitude", sparsity=0.2, tokenizer=model
    )
    shutil.copy(model / "elsa_report.json", other / "elsa_report.json")
    code, found = run(capsys, "verify", other)
    assert code == 3
    assert [c["name"] for c in found["checks"] if c["ok"] is False] == ["reference"]


def test_verify_says_that_a_probe_is_damaged(model, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    report = json.loads((folder / "elsa_report.json").read_text())
    del report["probe"]["language"][0]["greedy"]
    (folder / "elsa_report.json").write_text(json.dumps(report))
    code, found = run(capsys, "verify", folder)
    assert code == 3
    assert "damaged" in next(c["detail"] for c in found["checks"] if c["name"] == "reference")


def test_a_model_that_is_no_language_model_is_not_supported(cnn, tmp_path, capsys):
    import torch

    elsa_compile.compile(
        cnn, tmp_path / "model.onnx", "magnitude", example_inputs=(torch.randn(2, 3, 16, 16),)
    )
    code, found = run(capsys, "generate", tmp_path, "--prompt", "x")
    assert code in (2, 4)
    with pytest.raises(UnsupportedModelError, match="not a language model"):
        open_decoder(tmp_path, provider="cpu")
    code, found = run(capsys, "verify", tmp_path)
    assert code == 0
    assert {c["name"] for c in found["checks"] if c["ok"]} >= {"finite", "reference"}


# --- Bench ------------------------------------------------------------------------------------


def test_bench_measures_against_a_dense_file(model, llama_folder, tmp_path, capsys):
    recipe = elsa_compile.Recipe.parse("elsa_recipe: 1\npasses: [fold-constants]")
    elsa_compile.compile(llama_folder, tmp_path / "model.onnx", recipe)
    code, found = run(
        capsys, "bench", model, "--against", tmp_path / "model.onnx", "--prefill", 16,
        "--context", 8, "--steps", 2, "--repetitions", 3, "--warmup", 1,
    )  # fmt: skip
    assert code == 0
    assert [r["workload"] for r in found["results"]] == ["prefill 16", "decode at 8"]
    for result in found["results"]:
        ours, dense = (result[name]["seconds"] for name in ("model", "against"))
        assert len(ours) == len(dense) == 3
        assert min(*ours, *dense) > 0
        ratios = sorted(b / a for a, b in zip(ours, dense, strict=True))
        assert result["speedup"]["median"] == pytest.approx(ratios[1])
    for file in found["files"].values():
        assert file["load_s"] > 0
        assert file["peak_rss_bytes"] > 0
    assert found["repetitions"] == 3


def test_bench_refuses_a_reference_of_another_model(model, make_family, tmp_path, capsys):
    other = make_family("llama-tied")
    other.config.num_hidden_layers = 1
    del other.model.layers[1]
    elsa_compile.compile(other, tmp_path / "model.onnx")
    code, found = run(
        capsys, "bench", model, "--against", tmp_path, "--prefill", 8, "--context", 8,
        "--steps", 2, "--repetitions", 2,
    )  # fmt: skip
    assert code == 2
    assert "do not take the same inputs" in found["error"]


@pytest.mark.parametrize("option", ["--threads", "--repetitions", "--steps", "--prefill"])
def test_bench_refuses_numbers_that_make_no_sense(option, model, capsys):
    short = ["--prefill", "8", "--context", "8", "--steps", "2"]
    assert main(["bench", str(model), *short, option, "0"]) == 2
    assert option in capsys.readouterr().err


def test_an_unknown_provider_is_refused(model, capsys):
    assert main(["verify", str(model), "--provider", "tpu"]) == 2
    assert "--provider" in capsys.readouterr().err
