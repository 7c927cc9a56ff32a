"""Bad input: one clear sentence, the right exit code, no traceback, nothing half-written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from elsa_compile import cli


@pytest.fixture
def out(tmp_path):
    """An output folder with an earlier output in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"the earlier output")
    return folder


@pytest.fixture
def refuse(out, capsys):
    """Run elsa-compile; it must fail with `code` and say every word of `words` in one line."""

    def run(model, *options, code=2, words=(), output=None):
        arguments = [str(model), "-o", str(output or out / "model.onnx"), *map(str, options)]
        found = cli.main(arguments)
        captured = capsys.readouterr()
        said = [line for line in captured.err.splitlines() if line.startswith("elsa-compile: ")]
        assert found == code, captured.err
        assert len(said) == 1, captured.err
        assert "Traceback" not in captured.err
        assert "internal error" not in captured.err
        for word in words:
            assert str(word) in said[0]
        assert (out / "model.onnx").read_bytes() == b"the earlier output"
        assert [path.name for path in out.iterdir()] == ["model.onnx"]
        return said[0]

    return run


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of a good model folder, to be damaged."""
    return shutil.copytree(llama_folder, tmp_path / "llama")


# --- The model ------------------------------------------------------------------------------


def test_a_missing_file(refuse, tmp_path):
    refuse(tmp_path / "none.pt", words=("none.pt does not exist",))


def test_a_file_that_is_no_model(refuse, text_file):
    refuse(text_file, words=("is no model this compiler reads",))


def test_an_empty_folder(refuse, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, words=("holds no config.json",))


def test_a_hub_id_without_network(refuse, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse("someone/some-model-that-is-not-cached", words=("cannot be fetched",))


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "empty"])
def test_bad_safetensors(damage, refuse, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "corrupted": b"\xff" * 64, "empty": b""}
    path.write_bytes(damaged[damage])
    refuse(folder, words=("model.safetensors",))


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "empty"])
def test_a_bad_checkpoint(damage, refuse, mlp, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(mlp.state_dict(), path)
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "corrupted": b"\xff" * 64, "empty": b""}
    path.write_bytes(damaged[damage])
    refuse(path, words=("model.pt",))


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "empty"])
def test_a_bad_exported_program(damage, refuse, mlp, tmp_path):
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(mlp, (torch.randn(2, 16),)), path)
    content = path.read_bytes()
    middle = len(content) // 2
    mixed = content[:middle] + b"\xff" * 400 + content[middle + 400 :]
    damaged = {"truncated": content[:middle], "corrupted": mixed, "empty": b""}
    path.write_bytes(damaged[damage])
    refuse(path, words=("model.pt2 cannot be read as an exported program",))


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_one_flipped_bit_in_a_weight(suffix, refuse, mlp, tmp_path):
    """Torch does not look at the checksums of its own archives; the model would be another one."""
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(mlp.state_dict(), path)
    else:
        torch.export.save(torch.export.export(mlp, (torch.randn(2, 16),)), path)
    content = bytearray(path.read_bytes())
    weight = mlp[2].weight.detach().numpy().tobytes()
    content[content.index(weight) + 100] ^= 1
    path.write_bytes(content)
    refuse(path, words=("the checksum of", "does not fit"))


def _holds_itself(state):
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_holds_itself, "dict without weights"),
        (lambda state: {n: v.to_sparse() for n, v in state.items()}, "wanted a dense tensor"),
        (lambda state: {n: v.to("meta") for n, v in state.items()}, "has no values (meta)"),
    ],
    ids=["holds-itself", "sparse", "meta"],
)
def test_an_odd_state_dict(change, word, refuse, folder):
    state = load_file(folder / "model.safetensors")
    torch.save(change(state), folder / "model.pt")
    refuse(folder / "model.pt", words=(word,))


def test_statistics_that_are_not_finite(refuse, cnn, tmp_path):
    cnn.norm.running_var[2] = float("inf")
    path = tmp_path / "cnn.pt2"
    torch.export.save(torch.export.export(cnn, (torch.randn(2, 3, 16, 16),)), path)
    refuse(path, words=("norm.running_var holds 1 NaN or infinite",))


def test_a_config_for_a_model_that_has_one(refuse, llama_folder):
    refuse(llama_folder, "--config", llama_folder, words=("--config goes with a checkpoint",))


def test_a_pickled_module_without_inputs(refuse, mlp, tmp_path):
    torch.save(mlp, tmp_path / "mlp.pt")
    refuse(tmp_path / "mlp.pt", "--allow-pickle", words=("needs example inputs", "'model.pt2'"))


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "empty"])
def test_bad_gguf(damage, refuse, tmp_path):
    path = tmp_path / "model.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little") + (2).to_bytes(8, "little")
    damaged = {"truncated": head, "corrupted": b"\xff" * 4000, "empty": b""}
    path.write_bytes(damaged[damage])
    refuse(path, words=("model.gguf",))


def test_a_bare_state_dict(refuse, mlp, tmp_path):
    torch.save(mlp.state_dict(), tmp_path / "model.pt")
    refuse(tmp_path / "model.pt", words=("no config.json", "--config"))


def test_torchscript(refuse, mlp, tmp_path):
    torch.jit.trace(mlp, torch.randn(2, 16)).save(str(tmp_path / "model.pt"))
    refuse(tmp_path / "model.pt", words=("TorchScript",))


def test_a_config_that_does_not_fit_the_weights(refuse, folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    line = refuse(folder, words=("mlp", "the config wants", "more mismatches"))
    assert "and 5 more" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, refuse, folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name][3, 4] = value
    save_file(state, path, metadata={"format": "pt"})
    refuse(folder, words=(name, "1 NaN or infinite"))


def test_an_unknown_architecture(refuse, folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "perceptron9000"}))
    refuse(folder, code=4, words=("perceptron9000",))


def test_an_encoder_decoder_is_not_supported(refuse, folder):
    config = {"model_type": "t5", "d_model": 16, "is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, code=4, words=("encoder-decoder",))


# --- Text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"\x00\x01\x02\xff" * 50, "not UTF-8"), (b"abc\x00def", "binary")],
    ids=["empty", "not-utf8", "binary"],
)
@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_bad_text(option, content, word, refuse, llama_folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    options = ["--preset", "magnitude", option, path]
    refuse(llama_folder, *options, words=("text.txt", word))


def test_missing_text(refuse, llama_folder, tmp_path):
    refuse(llama_folder, "--data", tmp_path / "no.txt", words=("no.txt does not exist",))


def test_text_shorter_than_a_window(refuse, llama_folder, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A short text.")
    options = ["--preset", "magnitude", "--eval-data", path]
    refuse(llama_folder, *options, words=("short.txt", "--window"))


def test_calibration_without_data(refuse, llama_folder):
    refuse(llama_folder, "--preset", "wanda", words=("prune-wanda needs calibration data",))


# --- Options and recipes --------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1.0", "-0.1", "1.5", "nan"])
def test_sparsity_out_of_range(value, refuse, llama_folder):
    refuse(llama_folder, f"--sparsity={value}", words=("sparsity",))


def test_a_pattern_that_does_not_divide(refuse, llama_folder):
    options = ["--set", "allocate-uniform.pattern=3:7"]
    refuse(llama_folder, *options, words=("self_attn.q_proj.weight", "ignore"))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("elsa_recipe: 1\npasses: [prune-magnitud]", ("did you mean 'prune-magnitude'",)),
        ("elsa_recipe: 1\npasses:\n- prune-magnitude: {scop: row}", ("no option 'scop'",)),
        ("elsa_recipe: 1\npass: []", ("unknown key 'pass'", "did you mean 'passes'")),
        ("elsa_recipe: 1\npasses: []\npasses: []", ("line 3", "duplicate key 'passes'")),
        ("elsa_recipe: 7\npasses: []", ("reads format 1",)),
        ("elsa_recipe: 1\npasses: [prune-magnitude]", ("prune-magnitude needs PLANNED",)),
        ("a: [", ("not valid YAML",)),
        ("elsa_recipe: 1\npasses: [&a [x, x], [*a, *a]]", ("line 2", "an alias")),
    ],
    ids=["pass", "option", "key", "duplicate", "format", "order", "yaml", "alias"],
)
def test_bad_recipes(recipe, words, refuse, llama_folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    refuse(llama_folder, "--recipe", path, words=("recipe.yaml", *words)[-len(words) :])


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("nonsense", "pass.option=value"),
        ("prune-magnitude.speed=3", "no option 'speed'"),
        ("prune-wanda.samples=3", "the recipe has no pass 'prune-wanda'"),
        ("allocate-uniform.sparsity=lots", "wanted a number"),
    ],
)
def test_bad_settings(setting, word, refuse, llama_folder):
    refuse(llama_folder, "--set", setting, words=(word,))


def test_an_unknown_preset(refuse, llama_folder):
    refuse(llama_folder, "--preset", "wand", words=("did you mean 'wanda'",))


def test_an_unknown_option(refuse, llama_folder):
    refuse(llama_folder, "--sparsify", "0.5", words=("--sparsify",))


def test_a_plan_for_another_model(refuse, llama_folder, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("elsa_plan: 1\nweights:\n  fc.weight: {shape: [4, 4], sparsity: 0.5}\n")
    refuse(llama_folder, "--plan", plan, words=("no prunable weight 'fc.weight'",))


def test_a_missing_plan(refuse, llama_folder, tmp_path):
    refuse(llama_folder, "--plan", tmp_path / "no.yaml", words=("plan", "does not exist"))


# --- The output's place -----------------------------------------------------------------------


def test_an_output_without_onnx(refuse, llama_folder, out):
    refuse(llama_folder, output=out / "model.bin", words=("must be named *.onnx",))


def test_an_output_that_is_a_folder(refuse, llama_folder, tmp_path):
    (tmp_path / "x.onnx").mkdir()
    refuse(llama_folder, output=tmp_path / "x.onnx", words=("is a folder",))


def test_an_output_below_a_file(refuse, llama_folder, text_file):
    refuse(llama_folder, output=text_file / "model.onnx", words=("is no folder",))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_that_may_not_be_written(refuse, llama_folder, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refuse(llama_folder, output=locked / "model.onnx", words=("cannot be written",))


def test_an_output_on_a_read_only_file_system(refuse, llama_folder):
    refuse(llama_folder, output="/proc/model.onnx", words=("cannot be written",))


def test_other_files_in_the_way(refuse, llama_folder, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    refuse(llama_folder, output=foreign / "model.onnx", words=("would be replaced",))
    assert (foreign / "config.json").read_text() == "{}"


def test_a_full_disk(refuse, llama_folder, monkeypatch):
    """The disk fills up while the model file is written."""
    from elsa_compile import onnx_save

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_save, "_write_part", full)
    refuse(llama_folder, "--preset", "magnitude", words=("No space left", "untouched"))


def test_a_metrics_file_that_cannot_be_written(refuse, llama_folder, tmp_path):
    refuse(llama_folder, "--metrics", tmp_path / "no" / "m.jsonl", words=("metrics file",))


def test_ctrl_c(llama_folder, out, monkeypatch, capsys):
    from elsa_compile import export

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "to_ir", interrupted)
    assert cli.main([str(llama_folder), "-o", str(out / "model.onnx")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["model.onnx"]


def test_an_export_that_computes_something_else(refuse, llama_folder, monkeypatch):
    """A wrong file is exit code 3, and is not published."""
    from elsa_compile import export

    honest = export.to_ir

    def wrong(program):
        weight = program.weights["model.layers.1.mlp.up_proj.weight"]
        kept = weight.parameter.data.clone()
        weight.parameter.data.mul_(-1)
        try:
            model = honest(program)
            for value in model.graph.initializers.values():
                array = value.const_value.numpy().copy()
                import onnx_ir as ir

                value.const_value = ir.Tensor(array, name=value.name)
            return model
        finally:
            weight.parameter.data.copy_(kept)

    monkeypatch.setattr(export, "to_ir", wrong)
    refuse(llama_folder, "--preset", "magnitude", code=3, words=("was not written",))
