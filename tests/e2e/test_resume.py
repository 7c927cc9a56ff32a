"""The elsa preset on the command line: killed at any moment, it goes on to the same file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"


def command(output, *more):
    return [
        sys.executable, "-m", "elsa_compile.cli", str(TINY), "-o", str(output),
        "--preset", "elsa", "--sparsity", "0.8", "--data", str(TINY / "train.txt"),
        "--window", "32", "--threads", "1", "--json",
        "--set", "prune-elsa.steps=12", "--set", "prune-elsa.batch_size=2",
        "--set", "prune-elsa.interval=2", "--set", "prune-elsa.snapshot_minutes=0", *more,
    ]  # fmt: skip


def values(path):
    """All stored numbers of a file, sparse ones as (values, indices)."""
    graph = onnx.load(path).graph
    held = {t.name: [numpy_helper.to_array(t)] for t in graph.initializer}
    for sparse in graph.sparse_initializer:
        parts = [numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)]
        held[sparse.values.name] = parts
    return held


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing interrupted: (file, report)."""
    output = tmp_path_factory.mktemp("straight") / "model.onnx"
    done = subprocess.run(command(output), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def stop(output, number, step):
    """Start a run and signal it once the snapshot of `step` is there; its return code."""
    with subprocess.Popen(command(output), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        place = output.with_name(output.name + ".resume") / "prune-elsa"
        deadline = time.monotonic() + 240
        while not any(int(f.stem[5:]) >= step for f in place.glob("step-*.safetensors")):
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < deadline, "no snapshot came"
            time.sleep(0.01)
        os.kill(run.pid, number)
        run.communicate()
    return run.returncode


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_it_goes_on_bit_for_bit(straight, tmp_path, number, code):
    output = tmp_path / "model.onnx"
    assert stop(output, number, 3) == code
    assert not output.exists()
    done = subprocess.run(command(output), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "goes on at step" in done.stderr
    first, second = values(straight[0]), values(output)
    assert first.keys() == second.keys()
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            assert np.array_equal(a, b), name
    assert not output.with_name("model.onnx.resume").exists()


def test_another_recipe_over_an_old_run_is_refused(tmp_path):
    output = tmp_path / "model.onnx"
    stop(output, signal.SIGINT, 2)
    other = command(output, "--set", "prune-elsa.lr=0.001")
    done = subprocess.run(other, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "prune-elsa.lr was 'auto' and is 0.001" in done.stderr
    assert done.stderr.strip().count("\n") == done.stderr.strip().count("[")  # no traceback


def test_the_report_holds_the_course(straight):
    step = next(p for p in straight[1]["passes"] if p["name"] == "prune-elsa")
    assert {"loss", "primal", "dual", "churn", "penalty", "lr"} <= set(step["curves"])
    assert {"validation", "validation_projected"} <= set(step["curves"])
    assert straight[1]["sparsity"]["pruned"] == pytest.approx(0.8, abs=1e-4)
    page = (straight[0].parent / "elsa_report.html").read_text()
    assert "Course of prune-elsa" in page
