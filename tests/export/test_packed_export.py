"""--format packed: what the file holds, stock onnxruntime's results, and our kernels' results."""

import copy

import numpy as np
import onnx
import pytest

import elsa_compile
from elsa_compile import frontend
from elsa_compile.export import export, round_to_half
from elsa_compile.passes import AllocateUniform, PruneMagnitude, QuantizeWeights
from elsa_compile.runtime import kernels, provider
from elsa_compile.runtime.onnx_file import inspect
from elsa_compile.runtime.session import EXACT, session
from elsa_compile.runtime.unpack_file import unpack_file

CASES = {
    "float32": {},
    "float16": {"dtype": "fp16"},
    "bfloat16": {"dtype": "bf16"},
    "int8": {"bits": "int8", "head": "int8", "embedding": "int8"},
    "int4": {"bits": "int4", "group_size": 16},
}


@pytest.fixture(scope="module", params=CASES)
def files(request, make_family, tmp_path_factory):
    """The same pruned model, plain and packed."""
    options = dict(CASES[request.param])
    dtype = options.pop("dtype", "fp32")
    program = frontend.from_module(copy.deepcopy(make_family("llama")))
    steps = [AllocateUniform(sparsity=0.8), PruneMagnitude()]
    steps += [QuantizeWeights(**options)] if options else []
    program = elsa_compile.apply(program, *steps)
    if dtype != "fp32":
        round_to_half(program, dtype)
    folder = tmp_path_factory.mktemp(request.param)
    plain = export(program, folder / "plain.onnx", dtype=dtype)
    packed = export(program, folder / "packed.onnx", dtype=dtype, format="packed")
    return request.param, plain, packed


def logits(path, kernels_too):
    opened = session(path, 1, "cpu", config=EXACT, kernels=kernels_too)
    feeds = {"input_ids": np.arange(2, 26, dtype=np.int64).reshape(2, 12)}
    for each in opened.get_inputs():
        if each.name.startswith("past"):
            feeds[each.name] = np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32)
    names = {each.name for each in opened.get_inputs()}
    mask = {"attention_mask": np.ones((2, 12), np.int64)}
    place = {"position_ids": np.arange(12, dtype=np.int64)[None].repeat(2, 0)}
    feeds |= {k: v for k, v in (mask | place).items() if k in names}
    return opened.run(["logits"], feeds)[0]


def test_the_report_says_what_is_packed(files):
    _, plain, packed = files
    rows = {record.name: record for record in packed.records}
    taken = [record for record in packed.records if record.form == "packed"]
    assert taken
    for before in plain.records:
        after = rows[before.name]
        assert after.nonzeros == before.nonzeros
        assert after.stored_bytes <= before.stored_bytes
    held = {weight.name: weight for weight in inspect(packed.paths[0]).weights}
    assert {w.name for w in held.values() if w.form == "packed"} == {r.name for r in taken}
    assert packed.model_bytes < plain.model_bytes + 30_000  # functions of a tiny model
    assert sum(r.stored_bytes for r in packed.records) < sum(r.stored_bytes for r in plain.records)


def test_stock_onnxruntime_gives_the_same(files):
    _, plain, packed = files
    assert (logits(plain.paths[0], False) == logits(packed.paths[0], False)).all()


def test_unpacked_it_is_the_plain_file_again(files, tmp_path):
    _, plain, packed = files
    unpack_file(packed.paths[0], tmp_path / "model.onnx")
    onnx.checker.check_model(str(packed.paths[0]))
    assert (logits(plain.paths[0], False) == logits(tmp_path / "model.onnx", False)).all()
    kept = {w.name: w.shape for w in inspect(plain.paths[0]).weights}
    assert {w.name: w.shape for w in inspect(tmp_path / "model.onnx").weights} == kept


@pytest.mark.skipif(not kernels.available()[0], reason=kernels.available()[1])
def test_our_kernels_run_every_packed_matrix_packed(files):
    name, plain, packed = files
    stock = logits(packed.paths[0], False)
    ours = logits(packed.paths[0], True)
    claims = provider.claims()
    matrices = [record for record in packed.records if record.form == "packed"]
    if name == "int4":  # decoded by the function: no kernel multiplies int4
        assert all(claim["format"] == "dense" for claim in claims)
    else:
        taken = [claim for claim in claims if claim["format"] != "dense"]
        assert len(taken) >= len(matrices)
        looked_up = [claim for claim in taken if claim["op"] == "Gather"]
        assert len(looked_up) == sum("embed" in record.name for record in matrices)
    assert np.abs(ours - stock).max() < 1e-4 * np.abs(stock).max()
    assert (ours.argmax(-1) == stock.argmax(-1)).all()
