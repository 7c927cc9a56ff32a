"""Our execution provider in onnxruntime: what it takes, what it leaves, and that results stay."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import elsa_compile
from elsa_compile import runtime
from elsa_compile.runtime import kernels, packed, provider
from elsa_compile.runtime.decoder import Decoder
from elsa_compile.runtime.errors import UserInputError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
ISAS = ("portable", "avx2", "avx512", "avx512vnni")


def zeros_in(shape, sparsity, seed=0):
    random = np.random.default_rng(seed)
    weight = random.standard_normal(shape).astype(np.float32)
    weight[random.random(shape) < sparsity] = 0
    return weight


def saved(folder, nodes, initializers, columns, sparse=(), rank=3, opset=21):
    """A model of the nodes, from "x" (..., columns) to "z"."""
    free = ["a", "b", "c"][: rank - 1]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*free, columns])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
        sparse_initializer=list(sparse),
    )
    imports = [helper.make_opsetid("", opset)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def compared(path, x, options=True, threads=1, config=None):
    """(largest difference with and without, over the largest value; claims by node)."""
    ours = runtime.session(path, threads=threads, kernels=options, config=config)
    claims = {claim["node"]: claim for claim in provider.claims()}
    plain = runtime.session(path, threads=threads, kernels=False, config=config)
    (found,), (wanted,) = ours.run(None, {"x": x}), plain.run(None, {"x": x})
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if not found.size:
        return 0.0, claims
    return float(np.abs(found - wanted).max() / np.abs(wanted).max()), claims


def inputs(*shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MATMUL = [helper.make_node("MatMul", ["x", "w"], ["z"], name="product")]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 1), (3, 40), (1, 130), (0, 4), (4, 0)])
@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_products_with_zeros_are_taken_and_stay_the_same(tmp_path, sparsity, shape):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((577, 203), sparsity)}, 577)
    difference, claims = compared(path, inputs(*shape, 577))
    assert difference < 2e-6
    claim = claims["product"]
    if kernels.isa() != "portable":
        assert (claim["format"] == "sliced") == (sparsity > 0.5 and claim["lane_bytes"] == 0)
        assert (claim["rows"], claim["columns"]) == (203, 577)
        assert 0 < claim["bytes"] < 577 * 203 * 4
        assert claim["gain"] > 1


def test_an_output_head_is_kept_in_rows_where_that_was_measured():
    """49152 x 576 float32, and any int8 weight, on processors whose figure is in the table."""
    total = 49152 * 576
    form, gain = packed.choose(49152, 576, total)
    assert form == "dense" or (form == "rows" and gain > 1.15)
    for rows, columns in (
        (8192, 2048),
        (16384, 2048),
    ):  # layers of an MLP: prompts bring all tokens
        assert packed.choose(rows, columns, rows * columns)[0] == "dense"
    assert packed.choose(576, 49152, total)[0] == "dense"  # prompts bring it many tokens
    assert packed.choose(4096, 128, 4096 * 128)[0] == "dense"  # in the caches
    if form == "rows":
        assert packed.choose(576, 576, 576 * 576, "int8")[0] == "rows"
        assert packed.choose(576, 576, 576 * 576, "int8", whole=False)[0] != "rows"
        assert packed.choose(576, 576, 576 * 576 // 10, "int8")[0] != "rows"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_sessions_at_once_agree(tmp_path, threads):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((700, 1500), 0.6)}, 700)
    opened = runtime.session(path, threads=threads, kernels=True)
    plain = runtime.session(path, kernels=False)
    cases = [inputs(1, m, 700, seed=m) for m in (1, 7, 16, 90, 1, 300)]
    wanted = [plain.run(None, {"x": x})[0] for x in cases]
    faults = []

    def check():
        for _ in range(5):
            for x, y in zip(cases, wanted, strict=True):
                if np.abs(opened.run(None, {"x": x})[0] - y).max() > 1e-3:
                    faults.append(x.shape)

    workers = [threading.Thread(target=check) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not faults


def test_sparse_initializers_are_taken(tmp_path):
    weight = zeros_in((256, 192), 0.8)
    places = np.flatnonzero(weight)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(weight.reshape(-1)[places], "w"),
        numpy_helper.from_array(places.astype(np.int64), "w_indices"),
        weight.shape,
    )
    path = saved(tmp_path, MATMUL, {}, 256, sparse=[sparse])
    difference, claims = compared(path, inputs(2, 5, 256))
    assert difference < 1e-6
    assert claims["product"]["nonzeros"] == places.size


def gemm(**attributes):
    return [helper.make_node("Gemm", ["x", "w", "c"], ["z"], name="product", **attributes)]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("tokens", [1, 50])
def test_gemm_with_bias(tmp_path, transposed, tokens):
    weight = zeros_in((150, 256) if transposed else (256, 150), 0.7)
    initializers = {"w": weight, "c": inputs(150)}
    path = saved(tmp_path, gemm(transB=transposed), initializers, 256, rank=2)
    difference, claims = compared(path, inputs(tokens, 256))
    assert difference < 1e-6
    assert claims["product"]["format"] == "bitmap"


@pytest.mark.parametrize(
    ("attributes", "bias", "why"),
    [
        ({"alpha": 0.5}, (150,), "alpha"),
        ({"beta": 2.0}, (150,), "beta"),
        ({}, (), "bias"),
        ({}, (1,), "bias"),
        ({}, (40, 150), "bias"),
    ],
)
def test_other_gemms_are_left_and_why_is_said(tmp_path, attributes, bias, why):
    initializers = {"w": zeros_in((256, 150), 0.7), "c": np.array(inputs(*bias), np.float32)}
    path = saved(tmp_path, gemm(**attributes), initializers, 256, rank=2)
    difference, claims = compared(path, inputs(40, 256))
    assert difference == 0
    assert claims["product"]["format"] == "dense"
    assert why in claims["product"]["why"]


def test_dense_and_small_weights_are_left(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="dense"),
        helper.make_node("MatMul", ["y", "v"], ["z"], name="small"),
    ]
    initializers = {"w": zeros_in((256, 150), 0.1), "v": zeros_in((150, 20), 0.9)}
    difference, claims = compared(saved(tmp_path, nodes, initializers, 256), inputs(1, 3, 256))
    assert difference == 0
    assert "prompts would lose" in claims["dense"]["why"]
    assert "small" in claims["small"]["why"]


def test_products_of_activations_and_stacks_are_left(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="stack"),
        helper.make_node("Transpose", ["y"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["y", "t"], ["z"], name="pair"),
    ]
    path = saved(tmp_path, nodes, {"w": zeros_in((2, 256, 150), 0.9)}, 256)
    difference, claims = compared(path, inputs(2, 3, 256))
    assert difference == 0
    assert "not a float32 matrix" in claims["stack"]["why"]
    assert "pair" not in claims


def test_a_weight_of_two_products_is_packed_for_both(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="one"),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["z"], name="two"),
    ]
    path = saved(tmp_path, nodes, {"w": zeros_in((256, 256), 0.8)}, 256)
    difference, claims = compared(path, inputs(1, 3, 256))
    assert difference < 1e-6
    assert claims["one"]["format"] == claims["two"]["format"] == "bitmap"


def test_products_inside_a_branch_are_taken(tmp_path):
    """The weight is the outer graph's."""
    branch = [helper.make_node("MatMul", ["x", "w"], ["inner"], name="inside")]
    other = [helper.make_node("Identity", ["x"], ["same"])]
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["go"]),
        helper.make_node(
            "If",
            ["go"],
            ["z"],
            then_branch=helper.make_graph(
                branch, "then", [], [info("inner", TensorProto.FLOAT, None)]
            ),
            else_branch=helper.make_graph(
                other, "else", [], [info("same", TensorProto.FLOAT, None)]
            ),
        ),
    ]
    initializers = {"w": zeros_in((256, 256), 0.8), "limit": np.array(-1e9, np.float32)}
    path = saved(tmp_path, nodes, initializers, 256)
    difference, claims = compared(path, inputs(1, 3, 256))
    assert difference < 1e-6
    assert claims["inside"]["format"] == "bitmap"


# Quantised weights


def widened(axis, *, zero_point=False, op="MatMul", **attributes):
    named = ["q", "s", "p"] if zero_point else ["q", "s"]
    return [
        helper.make_node("DequantizeLinear", named, ["w"], axis=axis, name="widen"),
        helper.make_node(op, ["x", "w"], ["z"], name="product", **attributes),
    ]


def codes(shape, sparsity=0.7):
    random = np.random.default_rng(7)
    made = random.integers(-128, 128, shape).astype(np.int8)
    made[random.random(shape) < sparsity] = 0
    return made


EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("each", [True, False])
def test_int8_weights_are_taken_with_their_own_scales(tmp_path, op, each):
    rows, columns = 200, 320
    scales = np.random.default_rng(8).random(rows).astype(np.float32) / 50 if each else None
    scales = np.array(0.01, np.float32) if scales is None else scales
    turned = op == "Gemm"
    nodes = widened(0 if turned else 1, op=op, **({"transB": 1} if turned else {}))
    weight = codes((rows, columns) if turned else (columns, rows))
    path = saved(tmp_path, nodes, {"q": weight, "s": scales}, columns, rank=2)
    for tokens in (1, 30):
        # onnxruntime's switch for exact products of quantised weights is obeyed.
        options = {"least_gain": "0"}
        difference, claims = compared(path, inputs(tokens, columns), options, config=EXACT)
        assert difference < 2e-6
        assert claims["product"]["nonzeros"] == np.count_nonzero(weight)
    rounded, _ = compared(
        path, inputs(1, columns), {**options, "activations": "int16"}, config=EXACT
    )
    assert 2e-6 < rounded < 2e-4


def test_other_quantised_weights_are_left(tmp_path):
    scales = np.full(200, 0.01, np.float32)
    offset = {"q": codes((320, 200)), "s": scales, "p": np.full(200, 3, np.int8)}
    path = saved(tmp_path, widened(1, zero_point=True), offset, 320, rank=2)
    _, claims = compared(path, inputs(2, 320), {"least_gain": "0"}, config=EXACT)
    assert "zero point" in claims["product"]["why"]
    wrong = {"q": codes((320, 200)), "s": np.full(320, 0.01, np.float32)}
    path = saved(tmp_path, widened(0), wrong, 320, rank=2)
    difference, claims = compared(path, inputs(2, 320), {"least_gain": "0"}, config=EXACT)
    assert difference < 2e-6
    assert "one constant scale for each output" in claims["product"]["why"]


@pytest.mark.parametrize(
    ("scale", "why"), [(-0.01, "negative"), (np.nan, "not finite"), (2e36, ""), (1e-39, "")]
)
def test_odd_scales_are_left_or_exact(tmp_path, scale, why):
    """Integers are packed as they are: no scale is too large or too small for that."""
    scales = np.full(200, 0.01, np.float32)
    scales[3] = scale
    path = saved(tmp_path, widened(1), {"q": codes((320, 200)), "s": scales}, 320, rank=2)
    x = inputs(2, 320) * np.float32(1e-3)
    ours = runtime.session(path, threads=1, kernels={"least_gain": "0"}, config=EXACT)
    (claim,) = provider.claims()
    assert why in claim["why"]
    assert (claim["format"] == "dense") == bool(why)
    plain = runtime.session(path, threads=1, kernels=False, config=EXACT)
    (found,), (wanted,) = ours.run(None, {"x": x}), plain.run(None, {"x": x})
    for column in (3, 4):
        largest = np.abs(wanted[:, column]).max()
        assert np.allclose(
            found[:, column], wanted[:, column], rtol=1e-5, atol=2e-6 * largest, equal_nan=True
        )


def test_a_weight_that_is_not_finite_is_left_where_int8_is_wanted(tmp_path):
    weight = zeros_in((256, 192), 0.8)
    weight[5, 7] = np.inf
    path = saved(tmp_path, MATMUL, {"w": weight}, 256)
    runtime.session(path, kernels={"values": "int8"})
    assert "not finite" in provider.claims()[0]["why"]


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_products_of_one_input_share_a_node(tmp_path, tokens):
    """Nameless ones among them; each result is still its own."""
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["z"]),
        helper.make_node("MatMul", ["x", "k"], ["y"]),
        helper.make_node("MatMul", ["x", "v"], ["w"], name="value"),
    ]
    widths = {"q": 150, "k": 96, "v": 130}
    weights = {n: zeros_in((256, w), 0.8, seed=w) for n, w in widths.items()}
    path = saved(tmp_path, nodes, weights, 256)
    model = onnx.load(path)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("w", "y")
    )
    onnx.save(model, path)
    opened = runtime.session(path, threads=1, kernels=True)
    assert {claim["node"] for claim in provider.claims()} == {"z", "y", "value"}
    assert all(claim["format"] == "bitmap" for claim in provider.claims())
    x = inputs(1, tokens, 256)
    for name, found in zip("zwy", opened.run(None, {"x": x}), strict=True):
        wanted = x.astype(np.float64) @ weights[{"z": "q", "w": "v", "y": "k"}[name]]
        assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()


def test_a_weight_that_is_read_elsewhere_stays_there(tmp_path):
    """Looked up in, and an output of the graph, besides being multiplied with."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Gather", ["w", "two"], ["row"], axis=1),
        helper.make_node("Add", ["y", "first"], ["z"]),
        helper.make_node("ReduceMax", ["row"], ["first"], keepdims=0),
    ]
    initializers = {"w": zeros_in((256, 192), 0.8), "two": np.array([2], np.int64)}
    nodes[2], nodes[3] = nodes[3], nodes[2]
    path = saved(tmp_path, nodes, initializers, 256)
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [256, 192]))
    onnx.save(model, path)
    opened = runtime.session(path, threads=1, kernels=True)
    assert provider.claims()[0]["format"] == "bitmap"
    x = inputs(1, 2, 256)
    found, weight = opened.run(None, {"x": x})
    assert np.array_equal(weight, initializers["w"])
    assert np.abs(found - (x @ weight + weight[:, 2].max())).max() < 1e-4


# Real models, options, refusals


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The demo model at 80 % zeros."""
    pytest.importorskip("torch", reason="compiling needs torch")
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    elsa_compile.compile(TINY, path, "magnitude", sparsity=0.8)
    return path


def test_logits_of_a_pruned_llama_stay(tiny):
    ids = np.random.default_rng(3).integers(0, 200, (2, 40))
    results = []
    for choice in (True, False):
        decoder = Decoder(runtime.session(tiny, threads=1, kernels=choice), tiny)
        state = decoder.start(2)
        parts = [decoder.extend(state, ids[:, :33])]
        parts += [decoder.extend(state, ids[:, i : i + 1]) for i in range(33, 40)]
        results.append(np.concatenate(parts, axis=1))
        if choice:
            taken = [claim for claim in provider.claims() if claim["format"] != "dense"]
            assert len(taken) >= 15
    ours, plain = results
    assert np.abs(ours - plain).max() < 1e-4 * np.abs(plain).max()
    assert (ours.argmax(-1) == plain.argmax(-1)).all()


def documented(word):
    """The code block of docs/kernels.md that holds this word."""
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    (found,) = [block for block in blocks if word in block]
    return found


def test_the_documented_lines_run_in_plain_onnxruntime(tmp_path):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((256, 256), 0.8)}, 256)
    code = documented("import onnxruntime\n").replace('"model.onnx"', repr(str(path)))
    code += (
        "assert session.get_providers()[0] == get_ep_names()[0]\n"
        "from elsa_compile.runtime.provider import claims\n"
        "assert claims()[0]['format'] == 'bitmap', claims()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documented_lines_run_in_onnxruntime_genai(tiny):
    """Our kernels under genai's loop, the tokens those of genai without them."""
    pytest.importorskip("onnxruntime_genai", reason="pip install elsa-compile[genai]")
    code = documented("import onnxruntime_genai").replace('"folder"', repr(str(tiny.parent)))
    code += (
        "from elsa_compile.runtime.provider import claims\n"
        "taken = [claim for claim in claims() if claim['format'] != 'dense']\n"
        "assert taken, claims()\n"
        "def tokens(model):\n"
        "    params = og.GeneratorParams(model)\n"
        "    params.set_search_options(max_length=24, do_sample=False)\n"
        "    generator = og.Generator(model, params)\n"
        "    generator.append_tokens([[5, 17, 40, 9, 260, 33]])\n"
        "    found = []\n"
        "    while len(found) < 12 and not generator.is_done():\n"
        "        generator.generate_next_token()\n"
        "        found.append(int(generator.get_next_tokens()[0]))\n"
        "    return found\n"
        f"ours, stock = tokens(model), tokens(og.Model({str(tiny.parent)!r}))\n"
        "assert ours == stock and len(ours) > 2, (ours, stock)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_torch_model_with_zeroed_weights_is_taken_as_it_is(tmp_path):
    """Exported by torch.onnx alone: nothing of ours has touched the file."""
    torch = pytest.importorskip("torch", reason="exports with torch")
    torch.manual_seed(0)
    layers = torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256, bias=False)
    model = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in (layers[0], layers[2]):
            layer.weight[torch.rand_like(layer.weight) < 0.9] = 0
    x = torch.randn(3, 256)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
    ours = runtime.session(path, threads=1, kernels=True)
    claims = provider.claims()
    assert len(claims) == 2
    assert all(claim["format"] != "dense" for claim in claims), claims
    assert sum(claim["bytes"] for claim in claims) < 0.5 * 2 * 256 * 512 * 4
    (found,) = ours.run(None, {ours.get_inputs()[0].name: x.numpy()})
    assert np.abs(found - model(x).detach().numpy()).max() < 1e-4


def test_the_library_path_does_not_depend_on_the_folder_one_is_in(monkeypatch):
    path = Path(provider.get_library_path())
    assert path.is_absolute()
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(kernels, "library_path", lambda: Path(path.name))
    assert provider.get_library_path() == str(path)


def test_the_environment_turns_it_off_or_demands_it(tmp_path, monkeypatch, caplog):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((256, 256), 0.8)}, 256)
    assert provider.NAME in runtime.session(path).get_providers()
    monkeypatch.setenv(provider.ENVIRONMENT, "0")
    assert provider.NAME not in runtime.session(path).get_providers()
    assert provider.NAME in runtime.session(path, kernels=True).get_providers()
    monkeypatch.setenv(provider.ENVIRONMENT, "yes")
    with pytest.raises(UserInputError, match="ELSA_KERNELS is 'yes', wanted 0 or 1"):
        runtime.session(path)
    monkeypatch.setenv(provider.ENVIRONMENT, "1")
    monkeypatch.setattr(kernels, "_load", lambda: (None, "it is not there"))
    with pytest.raises(UserInputError, match="it is not there"):
        runtime.session(path)
    monkeypatch.delenv(provider.ENVIRONMENT)
    assert provider.NAME not in runtime.session(path).get_providers()
    assert "it is not there" in caplog.text


def test_wrong_options_are_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((256, 256), 0.8)}, 256)
    for options, said in (
        ({"value": "int8"}, "option 'value' is unknown, wanted values"),
        ({"values": "int2"}, "wanted one of exact, float32"),
        ({"least_gain": "much"}, "least_gain is 'much', wanted a number"),
    ):
        with pytest.raises(UserInputError, match=said):
            runtime.session(path, kernels=options)
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, "mmx")
    with pytest.raises(UserInputError, match="ELSA_ISA is 'mmx'"):
        runtime.session(path, kernels=True)


@pytest.mark.parametrize("version", [b"1.22.1", b"2.0.0"])
def test_an_unknown_onnxruntime_is_refused_by_name(version):
    """A stand-in for onnxruntime's base: its first function, and no table of version 23."""
    said = []
    create = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)

    @create
    def create_status(code, message):
        said.append(message.decode())
        return 1

    table = (ctypes.c_void_p * 400)()
    table[0] = ctypes.cast(create_status, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_uint32)
    def get_api(asked):
        return ctypes.addressof(table) if asked == 1 or version[:1] == b"2" else 0

    text = ctypes.create_string_buffer(version)

    @ctypes.CFUNCTYPE(ctypes.c_size_t)
    def get_version():
        return ctypes.addressof(text)

    class Base(ctypes.Structure):
        _fields_ = (("api", type(get_api)), ("version", type(get_version)))

    base, factories, count = Base(get_api, get_version), (ctypes.c_void_p * 4)(), ctypes.c_size_t(9)
    library = ctypes.CDLL(provider.get_library_path())
    library.CreateEpFactories.restype = ctypes.c_void_p
    status = library.CreateEpFactories(
        b"elsa", ctypes.byref(base), None, factories, ctypes.c_size_t(4), ctypes.byref(count)
    )
    assert status == 1
    assert count.value == 0
    assert f"this is {version.decode()}" in said[0]
    assert "1.23" in said[0]


def test_the_old_file_still_opens_without_anything_of_ours(tiny):
    """In a process that never imports elsa_compile."""
    code = (
        "import onnxruntime, sys\n"
        f"onnxruntime.InferenceSession({str(tiny)!r}, providers=['CPUExecutionProvider'])\n"
        "assert not any(name.startswith('elsa') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
