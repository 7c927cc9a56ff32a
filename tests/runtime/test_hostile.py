"""Hostile ONNX files given to elsa-run: refused in one sentence with exit code 2, never a crash."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile.runtime.cli import main

SHAPE = [8, 6]


def good():
    """y = x @ w, w (8, 6) sparse with 5 values."""
    values = numpy_helper.from_array(np.arange(1, 6, dtype=np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 7, 13, 20, 47]), "w_indices")
    sparse = helper.make_sparse_tensor(values, indices, SHAPE)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])],
        [],
        sparse_initializer=[sparse],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def sparse(model):
    return model.graph.sparse_initializer[0]


def set_indices(model, values, dims=None):
    tensor = numpy_helper.from_array(np.array(values, dtype=np.int64), "w_indices")
    if dims is not None:
        del tensor.dims[:]
        tensor.dims.extend(dims)
    sparse(model).indices.CopyFrom(tensor)


def set_dims(model, dims):
    del sparse(model).dims[:]
    sparse(model).dims.extend(dims)


def set_external(model, location, length="20", offset="0"):
    values = sparse(model).values
    values.ClearField("raw_data")
    values.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", length), ("offset", offset)):
        values.external_data.add(key=key, value=value)


def add_dense(model, dims, raw=b"", kind=TensorProto.FLOAT):
    model.graph.initializer.add(name="d", dims=dims, data_type=kind, raw_data=raw)


ATTACKS = {
    "index too large": (lambda m: set_indices(m, [0, 7, 13, 20, 48]), "the index 48"),
    "index negative": (lambda m: set_indices(m, [-1, 7, 13, 20, 47]), "the index -1"),
    "index huge": (lambda m: set_indices(m, [0, 7, 13, 20, 2**62]), "outside of its shape"),
    "index twice": (lambda m: set_indices(m, [0, 7, 7, 20, 47]), "a duplicate index"),
    "indices unsorted": (lambda m: set_indices(m, [7, 0, 13, 20, 47]), "unsorted indices"),
    "too few indices": (lambda m: set_indices(m, [0, 7]), "5 values but indices"),
    "more dims than data": (lambda m: set_indices(m, [0, 7], [5]), "bytes of data, wanted exactly"),
    "2-D out of range": (
        lambda m: set_indices(m, [[0, 0], [1, 1], [2, 2], [3, 3], [0, 6]]),
        "the index 6",
    ),
    "negative size": (lambda m: set_dims(m, [-8, 6]), "negative size"),
    "absurd size": (lambda m: set_dims(m, [2**62, 2**62]), "absurd size"),
    "absurd size hidden by 0": (lambda m: set_dims(m, [2**62, 0, 2**62]), "absurd size"),
    "no dimensions": (lambda m: set_dims(m, []), "no dimensions"),
    "values of two dimensions": (
        lambda m: sparse(m).values.dims.extend([1]),
        "wanted one dimension",
    ),
    "values of no type": (lambda m: setattr(sparse(m).values, "data_type", 99), "unknown element"),
    "dense negative size": (lambda m: add_dense(m, [-1]), "negative size"),
    "dense absurd size": (lambda m: add_dense(m, [2**40, 2**40]), "absurd size"),
    "dense too little data": (lambda m: add_dense(m, [4], b"\0" * 8), "wanted exactly 16"),
    "two weights of one name": (
        lambda m: m.graph.initializer.add(name="w", dims=[0], data_type=1),
        "two weights",
    ),
    "external above the folder": (lambda m: set_external(m, "../secret.bin"), "not inside"),
    "external hidden above": (lambda m: set_external(m, "a/../../secret.bin"), "not inside"),
    "external absolute": (lambda m: set_external(m, "/etc/passwd"), "not inside"),
    "external by a Windows path": (lambda m: set_external(m, "..\\secret.bin"), "not inside"),
    "external missing": (lambda m: set_external(m, "none.bin"), "not beside the model"),
    "external by a link": (lambda m: set_external(m, "link.bin"), "a link that leaves"),
    "external a folder": (lambda m: set_external(m, "folder"), "not a regular file"),
    "external too short": (lambda m: set_external(m, "short.bin"), "which has only"),
    "external wrong length": (
        lambda m: set_external(m, "data.bin", length="4000"),
        "wanted exactly 20",
    ),
    "external negative offset": (
        lambda m: set_external(m, "data.bin", offset="-8"),
        "wanted a byte count",
    ),
    "external offset past the end": (
        lambda m: set_external(m, "data.bin", offset="999999999999"),
        "which has only",
    ),
    "external in memory": (
        lambda m: set_external(m, "*/_ORT_MEM_ADDR_/*", offset="1024"),
        "address in memory",
    ),
    "name with control characters": (
        lambda m: (setattr(sparse(m).values, "name", "w\x1b[2J"), set_dims(m, [-1])),
        "\\x1b",
    ),
}


@pytest.fixture
def folder(tmp_path):
    """A model's folder among files it must not read."""
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\1" * 64)
    (inner / "data.bin").write_bytes(b"\1" * 64)
    (inner / "short.bin").write_bytes(b"\1" * 4)
    (inner / "folder").mkdir()
    (inner / "link.bin").symlink_to(tmp_path / "secret.bin")
    return inner


def test_the_model_itself_is_sound(folder, capsys):
    onnx.save(good(), str(folder / "model.onnx"))
    assert main(["verify", str(folder), "--provider", "cpu"]) == 0
    assert "1  " in capsys.readouterr().out


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_in_one_sentence(name, folder, capsys):
    attack, words = ATTACKS[name]
    model = good()
    attack(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert main(["verify", str(folder), "--provider", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err
    assert "internal error" not in captured.err
    assert "\x1b" not in captured.err


@pytest.mark.parametrize("command", ["verify", "generate", "eval", "bench"])
def test_every_command_refuses_it(command, folder, capsys, tmp_path):
    model = good()
    set_indices(model, [0, 7, 13, 20, 48])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    text = tmp_path / "text.txt"
    text.write_text("some text")
    options = {"generate": ["--prompt", "x"], "eval": ["--data", str(text)]}.get(command, [])
    assert main([command, str(folder), *options]) == 2
    assert capsys.readouterr().err.startswith("elsa-run: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an ONNX model"),
        (b"\xff" * 100, "not an ONNX model"),
        (b"PK\x03\x04 some zip", "not an ONNX model"),
        (good().SerializeToString()[:80], "not an ONNX model"),
    ],
    ids=["empty", "noise", "zip", "truncated"],
)
def test_what_is_no_onnx_file_is_refused(content, words, folder, capsys):
    (folder / "model.onnx").write_bytes(content)
    assert main(["verify", str(folder)]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_file_and_a_pipe_are_refused(folder, capsys):
    assert main(["verify", str(folder / "none.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err
    os.mkfifo(folder / "pipe.onnx")
    assert main(["verify", str(folder / "pipe.onnx")]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_functions_that_unfold_without_end_are_refused(folder, capsys):
    model = good()
    model.graph.node[0].domain = "bomb"
    model.graph.node[0].op_type = "f"
    node = helper.make_node("f", ["a", "b"], ["c"], domain="bomb")
    model.functions.append(
        helper.make_function("bomb", "f", ["a", "b"], ["c"], [node], [helper.make_opsetid("", 17)])
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert main(["verify", str(folder)]) == 2
    assert "calls itself" in capsys.readouterr().err


def test_a_process_survives_it(folder):
    """As a user runs it: exit code 2, not a signal, and JSON when asked for."""
    model = good()
    set_dims(model, [2**62, 2**62])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    done = subprocess.run(
        [sys.executable, "-m", "elsa_compile.runtime.cli", "verify", str(folder), "--json"],
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert '"exit_code": 2' in done.stdout
    assert "Traceback" not in done.stderr


def test_random_damage_never_crashes(folder, capsys):
    """Bytes of a sound file are changed at random: it is refused, or still runs."""
    random = np.random.default_rng(0)
    sound = good().SerializeToString()
    codes = set()
    for _ in range(150):
        damaged = bytearray(sound)
        for place in random.integers(0, len(damaged), random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        (folder / "model.onnx").write_bytes(bytes(damaged))
        codes.add(main(["verify", str(folder), "--provider", "cpu"]))
        captured = capsys.readouterr()
        assert "internal error" not in captured.err, bytes(damaged)
    assert codes <= {0, 2, 3, 4}
    assert {0, 2} <= codes
