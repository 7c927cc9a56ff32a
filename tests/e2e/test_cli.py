"""The command line as a process: a whole compilation, its numbers, an interruption."""

import json
import signal
import subprocess
import sys
import time

import pytest

COMPILE = [sys.executable, "-m", "elsa_compile.cli"]
RUN = [sys.executable, "-m", "elsa_compile.runtime.cli"]


def call(command, *options):
    arguments = [*command, *map(str, options)]
    return subprocess.run(arguments, cwd="/", capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, llama_folder, text_file):
    """(folder, finished process) of a compilation with everything switched on."""
    folder = tmp_path_factory.mktemp("cli")
    done = call(
        COMPILE, llama_folder, "-o", folder / "model.onnx", "--preset", "sparsegpt",
        "--sparsity", "0.8", "--data", text_file, "--eval-data", text_file, "--window", "48",
        "--max-windows", "6", "--dtype", "fp16", "--dump-ir", folder / "ir",
        "--metrics", folder / "metrics.jsonl", "--set", "prune-sparsegpt.samples=16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


def test_standard_output_is_the_table_and_its_words(compiled):
    _, done = compiled
    assert "perplexity" in done.stdout
    assert "stored coo (varint)" in done.stdout
    assert "those of a dense model" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 100
    assert "prune-sparsegpt" in done.stderr
    assert "Warning" not in done.stderr


def test_metrics_are_json_lines(compiled):
    folder, _ = compiled
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    perplexities = {e["model"]: e["value"] for e in lines if e.get("name") == "perplexity"}
    assert set(perplexities) == {"dense", "compiled", "onnxruntime"}
    stages = [e["stage"] for e in lines if e["event"] == "stage_end"]
    assert "prune-sparsegpt" in stages
    assert "export" in stages


def test_the_graph_was_dumped(compiled):
    folder, _ = compiled
    names = sorted(path.name for path in (folder / "ir").iterdir())
    assert names[0] == "00-traced.txt"
    assert "02-prune-sparsegpt.txt" in names


def test_elsa_run_gives_the_perplexity_of_the_report(compiled, text_file):
    folder, _ = compiled
    done = call(RUN, "eval", folder, "--data", text_file, "--window", 48, "--max-windows", 6,
                "--json", "--provider", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    report = json.loads((folder / "elsa_report.json").read_text())
    assert found["perplexity"] == pytest.approx(report["accuracy"]["onnxruntime"], rel=1e-6)
    assert found["tokens"] == report["accuracy"]["tokens"] == 6 * 47


def test_the_torch_side_gives_the_dense_perplexity(compiled, llama_folder, text_file):
    folder, _ = compiled
    done = call(COMPILE, "eval", llama_folder, "--data", text_file, "--window", 48,
                "--max-windows", 6, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "elsa_report.json").read_text())
    found = json.loads(done.stdout)
    assert found["perplexity"] == pytest.approx(report["accuracy"]["dense"], rel=1e-6)


def test_half_precision_weights_are_stored_as_halves(compiled):
    import onnx

    folder, _ = compiled
    model = onnx.load(str(folder / "model.onnx"))
    kinds = {s.values.data_type for s in model.graph.sparse_initializer}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_generation_repeats_itself(compiled):
    folder, _ = compiled
    options = ("generate", folder, "--prompt", "The old king", "--max-new-tokens", 8)
    first, second = (call(RUN, *options, "--provider", "cpu") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The old king")
    assert first.stdout == second.stdout


def test_a_dry_run_estimates_and_writes_nothing(compiled, llama_folder, tmp_path):
    folder, _ = compiled
    output = tmp_path / "new" / "model.onnx"
    options = ("-o", output, "--sparsity", "0.8", "--dtype", "fp16", "--dry-run", "--json")
    done = call(COMPILE, llama_folder, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not output.parent.exists()
    report = json.loads((folder / "elsa_report.json").read_text())
    assert found["output_bytes"] == pytest.approx(report["bytes"]["total"], rel=0.15)
    assert found["parameters"] == report["model"]["parameters"]
    assert found["seconds"] > 0


def test_ctrl_c_ends_with_130_and_leaves_nothing(llama_folder, tmp_path):
    output = tmp_path / "out" / "model.onnx"
    process = subprocess.Popen(
        [*COMPILE, str(llama_folder), "-o", str(output), "--preset", "magnitude"],
        cwd="/", stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "export: start" in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not output.parent.exists()


@pytest.mark.parametrize("name", ["prune-wanda", "prune-sparsegpt"])
def test_a_pass_explains_itself(name):
    done = call(COMPILE, "--explain", name)
    assert done.returncode == 0
    assert "samples: int = 128  (>= 1)" in done.stdout
    assert "requires: PLANNED" in done.stdout


def test_an_unknown_pass_is_not_explained():
    done = call(COMPILE, "--explain", "prune-wandaa")
    assert done.returncode == 2
    assert "did you mean 'prune-wanda'" in done.stderr


@pytest.mark.parametrize("command", [COMPILE, RUN])
def test_with_json_a_failure_is_one_object_too(command, tmp_path):
    words = {"-o": ("none.pt", "-o", tmp_path / "m.onnx"), "verify": ("verify", "none.onnx")}
    done = call(command, *words["-o" if command is COMPILE else "verify"], "--json")
    assert done.returncode == 2
    assert "does not exist" in json.loads(done.stdout)["error"]
    assert "does not exist" in done.stderr


def test_no_windows_are_not_taken_for_the_default(llama_folder, text_file, tmp_path):
    options = ("--eval-data", text_file, "--max-windows", 0, "--window", 16)
    done = call(COMPILE, llama_folder, "-o", tmp_path / "m.onnx", *options)
    assert done.returncode == 2
    assert "--max-windows is 0" in done.stderr
    assert "load and trace" not in done.stderr


def test_an_abbreviated_option_is_unknown(tmp_path):
    """What a prefix means would change with every new option."""
    done = call(COMPILE, "model.pt", "-o", tmp_path / "m.onnx", "--spars", "0.5")
    assert done.returncode == 2
    assert "--spars" in done.stderr
