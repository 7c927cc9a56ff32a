"""logits_to_keep: the last rows equal those of all rows, and the rest of the file stays."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import elsa_compile
from elsa_compile import export, frontend
from elsa_compile.last_logits import let_logits_be_chosen
from elsa_compile.passes import AllocateUniform, PruneMagnitude, QuantizeWeights
from elsa_compile.runtime import kernels, provider
from elsa_compile.runtime.bench import bench
from elsa_compile.runtime.decoder import Decoder, open_decoder
from elsa_compile.runtime.display import benchmark
from elsa_compile.runtime.onnx_file import inspect
from elsa_compile.runtime.session import EXACT, session

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
WIDTH, WORDS = 6, 5


def model(nodes, extra=(), shapes=(), outputs=()):
    """Hidden states (b, s, 6) -> logits (b, s, 5), by nodes that read `w`, `bias` and so on."""
    random = np.random.default_rng(0)
    held = {
        "w": random.standard_normal((WIDTH, WORDS)),
        "turned": random.standard_normal((WORDS, WIDTH)),
        "bias": random.standard_normal(WORDS),
        "cap": np.array(3.0),
        "places": random.standard_normal((1, 4, WORDS)),
    }
    constants = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in held.items()]
    constants.append(numpy_helper.from_array(np.array([-1, WIDTH]), "flat"))
    info = helper.make_tensor_value_info
    known = dict(shapes)
    known["logits"] = ["b", "s", WORDS]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", FLOAT, ["b", "s", WIDTH]), *(info(n, FLOAT, s) for n, s in dict(extra).items())],
        [info(name, FLOAT, known[name]) for name in ("logits", *outputs)],
        [each for each in constants if any(each.name in node.input for node in nodes)],
        value_info=[info(n, FLOAT, s) for n, s in known.items() if n not in ("logits", *outputs)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


ROWS = ["b", "s", WORDS]
node = helper.make_node
HEADS = {
    "product": ([node("MatMul", ["x", "w"], ["logits"])], {}),
    "turned": (
        [
            node("Transpose", ["turned"], ["t"], perm=[1, 0]),
            node("MatMul", ["x", "t"], ["logits"]),
        ],
        {},
    ),
    "bias": (
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["bias", "p"], ["logits"])],
        {"p": ROWS},
    ),
    "soft cap": (
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Div", ["p", "cap"], ["d"]),
            node("Tanh", ["d"], ["h"]),
            node("Mul", ["h", "cap"], ["logits"]),
        ],
        {"p": ROWS, "d": ROWS, "h": ROWS},
    ),
    "half and back": (
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Cast", ["p"], ["c"], to=TensorProto.DOUBLE),
            node("Cast", ["c"], ["logits"], to=FLOAT),
        ],
        {"p": ROWS},  # c is a double, which `model` does not declare
    ),
}
OTHERS = {
    "two activations": (
        dict(nodes=[node("MatMul", ["x", "y"], ["logits"])], extra={"y": [WIDTH, WORDS]}),
        "no constant matrix",
    ),
    "a bias of each place": (
        dict(
            nodes=[node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "places"], ["logits"])],
            shapes={"p": ["b", 4, WORDS]},
        ),
        "come from Add",
    ),
    "read elsewhere": (
        dict(
            nodes=[
                node("MatMul", ["x", "w"], ["p"]),
                node("Add", ["p", "bias"], ["logits"]),
                node("Neg", ["p"], ["more"]),
            ],
            shapes={"p": ROWS, "more": ROWS},
            outputs=["more"],
        ),
        "read elsewhere",
    ),
    "no head": (
        dict(nodes=[node("Softmax", ["p"], ["logits"]), node("MatMul", ["x", "w"], ["p"])][::-1],
             shapes={"p": ROWS}),
        "come from Softmax",
    ),
}  # fmt: skip


def run(proto, feeds):
    opened = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return opened.run(["logits"], feeds)[0]


@pytest.mark.parametrize("name", HEADS)
def test_the_last_rows_alone(name):
    nodes, shapes = HEADS[name]
    before = model(nodes, shapes=shapes)
    changed = ir.from_proto(before)
    assert let_logits_be_chosen(changed) is None
    after = ir.to_proto(changed)
    onnx.checker.check_model(after)
    x = np.random.default_rng(1).standard_normal((2, 7, WIDTH)).astype(np.float32)
    wanted = run(before, {"x": x})
    assert np.array_equal(run(after, {"x": x}), wanted)
    for keep, rows in ((0, 7), (1, 1), (3, 3), (7, 7), (9, 7)):
        found = run(after, {"x": x, "logits_to_keep": np.array(keep)})
        assert found.shape == (2, rows, WORDS)
        assert np.allclose(found, wanted[:, 7 - rows :], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_head_is_left_alone_and_said(name):
    built, reason = OTHERS[name]
    before = model(**built)
    changed = ir.from_proto(before)
    said = let_logits_be_chosen(changed)
    assert said is not None
    assert reason in said
    assert [n.op_type for n in changed.graph] == [n.op_type for n in before.graph.node]
    assert len(changed.graph.inputs) == len(before.graph.input)


def test_the_reason_reaches_the_notes_of_the_export(make_family, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "let_logits_be_chosen", lambda _: "so")
    written = export.export(frontend.from_module(make_family("opt")), tmp_path / "model.onnx")
    assert "logits of all positions are computed, whatever is read: so" in written.notes


def prefilled(decoder, batch=2, length=9):
    """A state after 9 tokens, and 5 more tokens."""
    ids = np.random.default_rng(2).integers(0, 300, (batch, length + 5))
    state = decoder.start(batch)
    decoder.extend(state, ids[:, :length])
    return state, ids[:, length:]


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt2", "neox"])
def test_an_exported_decoder_gives_what_is_asked_for(family, make_family, tmp_path):
    path = tmp_path / "model.onnx"
    written = export.export(frontend.from_module(make_family(family)), path)
    assert not any("logits of all" in note for note in written.notes)
    assert inspect(path).optional == ("logits_to_keep",)
    decoder, _ = open_decoder(path, 1, "cpu")
    assert decoder.chooses
    runs = []
    for keep in (0, 1, 3, 8):
        state, more = prefilled(decoder)
        runs.append(decoder.extend(state, more, keep=keep))
        assert state.length == 14
    whole = runs[0]
    assert [found.shape[1] for found in runs] == [5, 1, 3, 5]
    for found in runs[1:]:
        difference = np.abs(found - whole[:, 5 - found.shape[1] :]).max()
        assert difference <= 1e-6 * np.abs(whole).max()
    with pytest.raises(ValueError, match="keep is -1"):
        decoder.extend(decoder.start(), more[:1], keep=-1)


@pytest.fixture(scope="module")
def quantised(make_family, tmp_path_factory):
    """A pruned LLaMA in int8, its head too: plain, packed, and plain without the input."""
    folder = tmp_path_factory.mktemp("quantised")
    program = elsa_compile.apply(
        frontend.from_module(make_family("llama")),
        AllocateUniform(sparsity=0.8),
        PruneMagnitude(),
        QuantizeWeights(bits="int8", head="int8", embedding="int8"),
    )
    export.export(program, folder / "plain.onnx")
    export.export(program, folder / "packed.onnx", format="packed")
    older = onnx.load(folder / "plain.onnx")
    graph = older.graph
    part = next(n for n in graph.node if n.op_type == "Slice" and n.input[0] != n.input[1])
    head = next(n for n in graph.node if part.output[0] in n.input)
    head.input[0] = part.input[0]
    start = next(n for n in graph.node if part.input[1] in n.output)
    back = next(n for n in graph.node if start.input[0] in n.output)
    for each in (part, start, back):
        graph.node.remove(each)
    graph.input.remove(next(v for v in graph.input if v.name == "logits_to_keep"))
    graph.initializer.remove(next(t for t in graph.initializer if t.name == "logits_to_keep"))
    onnx.save(older, folder / "older.onnx")
    return folder


def optimised(path, folder):
    """Operators left after onnxruntime's own optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node)


def test_onnxruntime_folds_and_fuses_as_without_it(quantised, tmp_path):
    found = optimised(quantised / "plain.onnx", tmp_path)
    older = optimised(quantised / "older.onnx", tmp_path)
    assert older["MatMulNBits"] == 15  # two layers of seven, and the head
    assert found - older == Counter({"Neg": 1, "Unsqueeze": 1, "Slice": 1})
    assert not older - found


@pytest.mark.parametrize("ours", [False, True])
def test_a_packed_file_gives_what_is_asked_for(quantised, ours):
    if ours and not kernels.available()[0]:
        pytest.skip(kernels.available()[1])
    path = quantised / "packed.onnx"
    options = {"least_gain": "0"} if ours else False
    decoder = Decoder(session(path, 1, "cpu", config=EXACT, kernels=options), path)
    if ours:
        assert any(claim["format"] != "dense" for claim in provider.claims())
    whole, last = (decoder.extend(*prefilled(decoder), keep=keep) for keep in (0, 1))
    assert last.shape == (2, 1, 300)
    assert np.abs(last - whole[:, -1:]).max() <= 1e-6 * np.abs(whole).max()


def test_a_file_without_the_input_still_works(quantised):
    decoder, file = open_decoder(quantised / "older.onnx", 1, "cpu")
    assert not decoder.chooses
    assert file.optional == ()
    whole, last = (decoder.extend(*prefilled(decoder), keep=keep) for keep in (0, 2))
    assert np.array_equal(last, whole[:, -2:])


@pytest.mark.parametrize(
    ("against", "which", "said"),
    [
        ("stock", "last position", "logits of the last position alone, on both sides"),
        ("older.onnx", "all positions", "all positions, on both sides: a file has no input"),
    ],
)
def test_bench_asks_both_sides_for_the_same(quantised, against, which, said):
    other = against if against == "stock" else quantised / against
    result = bench(
        quantised / "plain.onnx", other, prefill=[4], context=[4], steps=1, warmup=0,
        repetitions=2, threads=1, provider="cpu",
    )  # fmt: skip
    assert result["prefill_logits"] == which
    assert said in benchmark(result)
