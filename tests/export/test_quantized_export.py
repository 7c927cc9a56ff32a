"""Quantised files: decoded by ONNX's definitions alone, and run in a stock onnxruntime."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import elsa_compile
from elsa_compile import frontend, quantised_weights
from elsa_compile.errors import VerificationError
from elsa_compile.export import export, round_to_half
from elsa_compile.passes import AllocateUniform, PruneMagnitude, QuantizeWeights
from elsa_compile.recipe import Recipe
from elsa_compile.runtime.onnx_file import inspect
from elsa_compile.runtime.session import EXACT, session
from elsa_compile.runtime.verify import verify
from elsa_compile.verify_export import check_logits

FORMS = {
    "int8": {},
    "int8 in groups": {"group_size": 16},
    "int4 in groups": {"bits": "int4", "group_size": 16},
    "int4 all over": {"bits": "int4", "group_size": 16, "head": "int4", "embedding": "int4"},
    "int4 in odd groups": {"bits": "int4", "group_size": 8, "head": "int4", "embedding": "int4"},
    "int4, short scales": {
        "bits": "int4",
        "group_size": 16,
        "scales": "float16",
        "embedding": "int4",
        "head": "int4",
    },
    "int8, short scales": {"scales": "float16"},
    "int4 rows": {"bits": "int4", "head": "int4", "embedding": "int4"},
}


def integers(graph):
    """Name -> whole numbers of every int8 and int4 initializer, from the bytes in the file."""
    found = {}
    for tensor in graph.initializer:
        raw = np.frombuffer(tensor.raw_data, np.uint8)
        size = int(np.prod(tensor.dims))
        if tensor.data_type == TensorProto.INT4:
            halves = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[:size].astype(np.int64)
            found[tensor.name] = np.where(halves > 7, halves - 16, halves).reshape(tensor.dims)
        elif tensor.data_type == TensorProto.INT8:
            found[tensor.name] = raw.view(np.int8).astype(np.int64).reshape(tensor.dims)
    for sparse in graph.sparse_initializer:
        if sparse.values.data_type == TensorProto.INT8:
            flat = np.zeros(int(np.prod(sparse.dims)), np.int64)
            values = np.frombuffer(sparse.values.raw_data, np.int8)
            flat[np.array(sparse.indices.int64_data)] = values
            found[sparse.values.name] = flat.reshape(sparse.dims)
    return found


def decoded(path):
    """Name -> float32 values, as the node that reads the whole numbers is defined to give them."""
    graph = onnx.load(str(path)).graph
    whole = integers(graph)
    floats = {t.name: onnx.numpy_helper.to_array(t).astype(np.float32) for t in graph.initializer
              if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)}  # fmt: skip
    found = {}
    turned = {}  # whole numbers or scales behind a Transpose -> their initializer
    for node in graph.node:
        name = next((n for n in node.input if n in whole), None)
        if node.op_type == "Transpose" and node.input[0] in {**whole, **floats}:
            store = whole if node.input[0] in whole else floats
            store[node.output[0]] = store[node.input[0]].T
            turned[node.output[0]] = node.input[0]
            continue
        if node.op_type == "Cast" and node.input[0] in floats:
            floats[node.output[0]] = floats[node.input[0]]
        if name is None:
            continue
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values = whole[name].astype(np.float32)
        if node.op_type == "DequantizeLinear" and "block_size" in options:
            scale = np.repeat(floats[node.input[1]], options["block_size"], options["axis"])
        elif node.op_type == "DequantizeLinear":
            shape = [1] * values.ndim
            shape[options["axis"]] = -1
            scale = floats[node.input[1]].reshape(shape)
        elif node.op_type == "GatherBlockQuantized":
            scale = floats.get(node.input[2], floats[f"{name}.scale"].reshape(len(values), -1))
            scale = np.repeat(scale, options["block_size"], 1)
        else:
            assert node.op_type == "Gather", node.op_type  # of rows, times the rows' scales
            scale = floats[f"{name}.scale"][:, None]
        result = values * scale
        if name in turned:
            name, result = turned[name], result.T
        assert name not in found or np.array_equal(found[name], result), "two readers disagree"
        found[name] = result
    return found


def is_stored(weight, values):
    """Whether an array holds a weight's values, in either layout."""
    wanted = weight.matrix().detach().numpy()
    if values.ndim > 2:
        values = values.reshape(wanted.shape)
    return any(v.shape == wanted.shape and np.array_equal(v, wanted) for v in (values, values.T))


@pytest.fixture(scope="module")
def build(make_family):
    """(family, options) -> a pruned and quantised program."""
    models = {}

    def make(family, sparsity=0.6, **options):
        models.setdefault(family, make_family(family))
        program = frontend.from_module(copy.deepcopy(models[family]))
        steps = AllocateUniform(sparsity=sparsity), PruneMagnitude(), QuantizeWeights(**options)
        return elsa_compile.apply(program, *steps)

    return make


@pytest.mark.parametrize(
    ("family", "form", "products", "widened"),
    [
        ("llama", "int8", 15, 0),
        ("llama", "int8 in groups", 15, 0),
        ("llama", "int4 in groups", 15, 0),
        ("llama", "int4 in odd groups", 0, 16),
        ("llama", "int4, short scales", 15, 0),
        ("llama-tied", "int8, short scales", 15, 0),
        ("llama-tied", "int8", 15, 0),
        ("llama-tied", "int4 all over", 15, 0),
        ("llama-tied", "int4 rows", 15, 0),
        ("gpt2", "int8", 9, 0),
    ],
)
def test_the_file_holds_the_grid_and_no_pruned_entry_wakes_up(
    build, family, form, products, widened, tmp_path
):
    program = build(family, **FORMS[form])
    path = tmp_path / "model.onnx"
    result = export(program, path)
    found = decoded(path)
    grids = program.grids()
    assert set(found) == set(grids)
    for name in grids:
        assert is_stored(program.weights[name], found[name]), name
    for weight, plan in program.planned():
        values = found[weight.name]
        kept = plan.mask.numpy()
        wanted = weight.matrix().detach().numpy()
        layout = values if np.array_equal(values, wanted) else values.T
        assert np.array_equal(layout, wanted)
        assert np.count_nonzero(layout[~kept]) == 0
        assert np.count_nonzero(layout[kept]) > 0.5 * kept.sum()
    check = check_logits(program, session(path, 1, "cpu", config=EXACT))
    assert check.ok, check.detail
    assert check.difference < 1e-5
    checks = {check.name: check for check in verify(path, provider="cpu", threads=1).checks}
    assert checks["activations"].ok
    assert all(check.ok is not False for check in checks.values())
    # A stock onnxruntime multiplies the whole numbers; what it widens at each run is said.
    nodes = optimised(path, tmp_path)
    assert (nodes["MatMulNBits"], nodes["DequantizeLinear"]) == (products, widened)
    assert sum("at each run" in note for note in result.notes) == widened


def optimised(path, tmp_path):
    """Operator counts of the graph that a stock onnxruntime makes of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)


def test_very_sparse_int8_is_stored_as_coo_and_computes_the_same(build, tmp_path):
    program = build("llama", sparsity=0.9)
    path = tmp_path / "model.onnx"
    result = export(program, path)
    sparse = [r for r in result.records if r.form == "coo"]
    # The key and value projections have 512 bytes, too few for the sparse form.
    large = {w.name for w, _ in program.planned() if w.parameter.numel() >= 1024}
    assert {r.name for r in sparse} == large
    assert all(r.dtype == "int8" and r.stored_bytes < r.dense_bytes for r in sparse)
    assert len(onnx.load(str(path)).graph.sparse_initializer) == len(large) == 10
    for name, values in decoded(path).items():
        assert is_stored(program.weights[name], values), name
    assert check_logits(program, session(path, 1, "cpu", config=EXACT)).difference < 1e-5


def test_half_precision_is_for_what_is_not_quantised(build, tmp_path):
    program = build("llama", head="none", embedding="none")
    before = {name: program.weights[name].matrix().clone() for name in program.grids()}
    round_to_half(program, "fp16")
    assert all(torch.equal(program.weights[n].matrix(), before[n]) for n in before)
    path = tmp_path / "model.onnx"
    export(program, path, dtype="fp16")
    types = {weight.name: weight.dtype for weight in inspect(path).weights}
    assert types["lm_head.weight"] == types["model.embed_tokens.weight"] == "float16"
    assert types["model.layers.0.mlp.up_proj.weight"] == "int8"
    assert check_logits(program, session(path, 1, "cpu", config=EXACT)).ok


def test_short_scales_are_stored_in_half_the_bytes(build, tmp_path):
    sizes = {}
    for form in ("int4 all over", "int4, short scales"):
        path = tmp_path / "model.onnx"
        result = export(build("llama", **FORMS[form]), path)
        scales = [r for r in result.records if r.name.endswith(".scale")]
        sizes[form] = sum(int(np.prod(r.shape)) * np.dtype(r.dtype).itemsize for r in scales)
        assert {r.float_bytes for r in scales} == {0}
    assert sizes["int4 all over"] == 2 * sizes["int4, short scales"] > 0


def test_the_records_are_exact_and_remember_the_float_form(build, tmp_path):
    for form in ("int8", "int4 in groups"):
        path = tmp_path / "model.onnx"
        result = export(build("llama", **FORMS[form]), path)
        graph = onnx.load(str(path)).graph
        for record in result.records:
            lone = onnx.GraphProto()
            lone.initializer.extend(t for t in graph.initializer if t.name == record.name)
            if record.form == "dense":
                assert record.stored_bytes == lone.ByteSize(), record.name
            tensor = next((t for t in lone.initializer if t.data_type == TensorProto.INT4), None)
            if tensor is not None:
                assert record.nonzeros == np.count_nonzero(integers(lone)[tensor.name])
        up = next(r for r in result.records if r.name.endswith("0.mlp.up_proj.weight"))
        assert 4 * 32 * 64 < up.float_bytes < 4 * 32 * 64 + 100
        scales = [r for r in result.records if r.name.endswith(".scale")]
        assert len(scales) == 16
        assert {r.float_bytes for r in scales} == {0}


def test_convolutions_and_biased_layers(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(16 * 16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10),
    ).eval()  # fmt: skip
    for bits in ("int8", "int4"):
        program = elsa_compile.apply(
            copy.deepcopy(model), AllocateUniform(sparsity=0.5, targets=["re:.*weight"]),
            PruneMagnitude(), QuantizeWeights(bits=bits),
            example_inputs=(torch.randn(2, 3, 4, 4),),
        )  # fmt: skip
        path = tmp_path / f"{bits}.onnx"
        export(program, path)
        found = decoded(path)
        assert set(found) == {"0.weight", "3.weight", "5.weight"}
        for name, values in found.items():
            assert is_stored(program.weights[name], values), name
        check = check_logits(program, session(path, 1, "cpu", config=EXACT))
        assert check.difference < 1e-5
        assert "Gemm" not in Counter(n.op_type for n in onnx.load(str(path)).graph.node)


def test_data_beside_the_model(build, tmp_path):
    from elsa_compile.export import _names_in_graph, _quantised, to_ir
    from elsa_compile.write_onnx import write_onnx

    program = build("llama", **FORMS["int4 all over"])
    path = tmp_path / "model.onnx"
    result = write_onnx(
        to_ir(program), path, expected_weights=_names_in_graph(program),
        quantised=_quantised(program), in_file_limit_bytes=45_000,
    )  # fmt: skip
    assert result.data_bytes > 0
    assert any(r.external and r.dtype == "int4" for r in result.records)
    assert check_logits(program, session(path, 1, "cpu", config=EXACT)).difference < 1e-5


def test_a_file_with_wrong_numbers_is_not_written(llama_folder, tmp_path, monkeypatch):
    honest = quantised_weights._integers

    def shifted(weight, shape, axis):
        moved = replace(weight, integers=np.roll(weight.integers, 1, axis=1))
        return honest(moved, shape, axis)

    monkeypatch.setattr(quantised_weights, "_integers", shifted)
    recipe = Recipe((QuantizeWeights(),))
    with pytest.raises(VerificationError, match="was not written: (reference|logits)"):
        elsa_compile.compile(llama_folder, tmp_path / "model.onnx", recipe)
    assert not (tmp_path / "model.onnx").exists()
