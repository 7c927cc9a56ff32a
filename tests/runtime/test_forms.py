"""Sizes of all forms side by side, against files really written."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from elsa_compile.runtime import forms
from elsa_compile.runtime.cli import main
from elsa_compile.runtime.explain import explain
from elsa_compile.runtime.pack_file import pack_file
from elsa_compile.runtime.unpack_file import unpack_file


@pytest.fixture
def dense(tmp_path):
    random = np.random.default_rng(0)
    weight = random.standard_normal((256, 192)).astype(np.float32)
    weight[random.random(weight.shape) < 0.8] = 0
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["m", 256])],
        [helper.make_tensor_value_info("y", 1, ["m", 192])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "d.onnx")
    return tmp_path / "d.onnx"


def test_sizes_are_those_of_real_files(dense, tmp_path):
    pack_file(dense, tmp_path / "packed.onnx")
    unpack_file(tmp_path / "packed.onnx", tmp_path / "coo.onnx", form="coo")
    said = {}
    for name in ("d", "packed", "coo"):
        found = explain(tmp_path / f"{name}.onnx")
        (weight,) = found["weights"]
        rows = {row["form"]: row for row in found["forms"]}
        form = weight["form"]
        assert [row["form"] for row in found["forms"] if row["now"]] == [form]
        assert rows[form]["bytes"] == pytest.approx(weight["stored_bytes"], rel=0.05)
        said[name] = [row["bytes"] for row in found["forms"][:-1]]
        assert (found["decode_bytes"] > 0) == (name == "packed")
    assert said["d"] == said["packed"] == said["coo"]  # whichever form it is read from
    dense_bytes, coo, packed, int8 = said["d"]
    assert dense_bytes > coo > packed > int8


def test_the_archive_is_estimated_from_samples(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    assert forms.archive_bytes([path]) < 5000
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    assert forms.archive_bytes([path]) == pytest.approx(1 << 20, rel=0.01)
    path.write_bytes(b"")
    assert forms.archive_bytes([path]) == 0


def test_the_text_says_what_runs_what(dense, tmp_path, capsys):
    pack_file(dense, tmp_path / "packed.onnx")
    assert main(["explain", str(tmp_path / "packed.onnx")]) == 0
    text = capsys.readouterr().out
    assert "packed (this file)" in text
    assert "elsa-run unpack" in text
    assert "while it decodes" in text
