"""What stands between products is one node with them: same results, fewer nodes, no circles."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile import runtime
from elsa_compile.runtime import kernels, provider
from elsa_compile.runtime.errors import UserInputError
from tests.runtime.test_provider import ISAS, compared, inputs, saved, zeros_in

WIDTH, WIDE = 192, 320
ALL = {"least_gain": "0"}


def node(op, *names, **attributes):
    *sources, result = names
    return helper.make_node(op, sources, [result], name=result, **attributes)


def weights(**shapes):
    made = {name: zeros_in(shape, 0.7, seed) for seed, (name, shape) in enumerate(shapes.items())}
    random = np.random.default_rng(9)
    made |= {f"s{width}": random.random(width, np.float32) + 0.5 for width in (WIDTH, WIDE)}
    return made | {f"b{width}": inputs(width) for width in (WIDTH, WIDE)}


GATED = [
    node("RMSNormalization", "x", "s192", "norm", epsilon=1e-6),
    node("MatMul", "norm", "gate", "g"),
    node("MatMul", "norm", "up", "u"),
    node("Sigmoid", "g", "open"),
    node("Mul", "g", "open", "act"),
    node("Mul", "act", "u", "inner"),
    node("MatMul", "inner", "down", "back"),
    node("Add", "x", "back", "sum"),
    node("RMSNormalization", "sum", "s192", "z"),
]
GATED_WEIGHTS = {"gate": (WIDTH, WIDE), "up": (WIDTH, WIDE), "down": (WIDE, WIDTH)}


def plain(act, **attributes):
    """A block with biases and LayerNormalization around an activation."""
    return [
        node("LayerNormalization", "x", "s192", "b192", "norm"),
        node("MatMul", "norm", "up", "u"),
        node("Add", "b320", "u", "biased"),
        node(act, "biased", "act", **attributes),
        node("MatMul", "act", "down", "back"),
        node("Add", "back", "x", "z"),
    ]


PLAIN_WEIGHTS = {"up": (WIDTH, WIDE), "down": (WIDE, WIDTH)}


def parts_of(path, options=None):
    """Operators in each of our fused nodes, and of the nodes left to onnxruntime."""
    import onnxruntime

    session = onnxruntime.SessionOptions()
    session.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session.add_provider_for_devices(provider.devices(onnxruntime), ALL | (options or {}))
    opened = onnxruntime.InferenceSession(str(path), session)
    if not hasattr(opened, "get_provider_graph_assignment_info"):
        pytest.skip(
            "onnxruntime 1.23 does not tell what is in a node"
        )  # results are compared before
    parts = opened.get_provider_graph_assignment_info()
    ours, others = [], []
    for part in parts:
        names = sorted(each.op_type for each in part.get_nodes())
        ours.append(names) if part.ep_name == provider.NAME else others.extend(names)
    return ours, others


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 9), (0, 3), (3, 400)])
def test_a_gated_block_is_one_node_with_the_same_result(tmp_path, monkeypatch, isa, tokens):
    monkeypatch.delenv(kernels.ISA_ENVIRONMENT, raising=False)
    if isa not in ISAS[: ISAS.index(kernels.isa()) + 1]:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, isa)
    path = saved(tmp_path, GATED, weights(**GATED_WEIGHTS), WIDTH, opset=23)
    for threads in (1, 3):
        difference, claims = compared(path, inputs(*tokens, WIDTH), ALL, threads)
        assert difference < 3e-6
        assert len(claims) == 3
    ours, others = parts_of(path)
    assert [len(names) for names in ours] == [len(GATED)]
    assert others == []


@pytest.mark.parametrize(
    ("act", "attributes"),
    [("Relu", {}), ("Gelu", {}), ("Gelu", {"approximate": "tanh"}), ("Sigmoid", {})],
)
def test_a_plain_block_is_one_node_with_the_same_result(tmp_path, act, attributes):
    path = saved(tmp_path, plain(act, **attributes), weights(**PLAIN_WEIGHTS), WIDTH, opset=23)
    x = 4 * inputs(2, 30, WIDTH)
    difference, _ = compared(path, x, ALL)
    assert difference < 3e-6
    ours, others = parts_of(path)
    assert [len(names) for names in ours] == [6]
    assert others == []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["Sigmoid", "Relu", "Gelu", "silu", "tanh"])
def test_functions_over_their_whole_range(tmp_path, monkeypatch, isa, act):
    monkeypatch.delenv(kernels.ISA_ENVIRONMENT, raising=False)
    if isa not in ISAS[: ISAS.index(kernels.isa()) + 1]:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, isa)
    middle = {"silu": [node("Sigmoid", "y", "s"), node("Mul", "s", "y", "z")]}.get(
        act, [node("Gelu", "y", "z", approximate="tanh") if act == "tanh" else node(act, "y", "z")]
    )
    size = 256
    eye = np.eye(size, dtype=np.float32)
    path = saved(tmp_path, [node("MatMul", "x", "eye", "y"), *middle], {"eye": eye}, size, opset=23)
    grid = np.concatenate([np.linspace(-90, 90, 160), np.linspace(-4, 4, 96)])
    x = np.stack([grid, grid * 1e-3, grid * 1e3])[None].astype(np.float32)
    found = runtime.session(path, threads=1, kernels=ALL).run(None, {"x": x})[0]
    wide = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-np.clip(wide, -700, 700)))
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    wanted = {
        "Sigmoid": sigmoid,
        "Relu": np.maximum(wide, 0),
        "silu": wide * sigmoid,
        "Gelu": wide * 0.5 * (1 + np.vectorize(math.erf)(wide / np.sqrt(2))),
        "tanh": wide * 0.5 * (1 + np.tanh(inner)),
    }[act]
    assert np.abs(found - wanted).max() <= 2e-7 * max(1.0, np.abs(wanted).max())
    small = np.abs(wide) < 4
    assert np.abs(found - wanted)[small].max() < 1.5e-6
    assert len(parts_of(path)[0]) == 1


def test_not_a_number_stays_one(tmp_path):
    path = saved(tmp_path, GATED, weights(**GATED_WEIGHTS), WIDTH, opset=23)
    x = inputs(1, 3, WIDTH)
    x[0, 1, 5] = np.nan
    found = runtime.session(path, threads=1, kernels=ALL).run(None, {"x": x})[0]
    assert np.isnan(found[0, 1]).all()
    assert np.isfinite(found[0, [0, 2]]).all()


def test_products_alone_on_request(tmp_path):
    path = saved(tmp_path, GATED, weights(**GATED_WEIGHTS), WIDTH, opset=23)
    ours, _ = parts_of(path, {"fuse": "products"})
    assert sorted(ours) == [["MatMul"], ["MatMul", "MatMul"]]
    x = inputs(2, 5, WIDTH)
    apart, _ = compared(path, x, ALL | {"fuse": "products"})
    assert apart < 3e-6
    with pytest.raises(UserInputError, match="fuse is 'none', wanted one of all, products"):
        runtime.session(path, kernels={"fuse": "none"})


def test_what_comes_back_from_elsewhere_is_another_node(tmp_path):
    """A value leaves for an operator that is not ours and meets its own source again."""
    nodes = [
        node("MatMul", "x", "a", "first"),
        node("Softmax", "first", "soft", axis=-1),
        node("Add", "first", "soft", "both"),
        node("MatMul", "both", "b", "z"),
    ]
    path = saved(tmp_path, nodes, weights(a=(WIDTH, WIDE), b=(WIDE, WIDTH)), WIDTH, opset=23)
    assert compared(path, inputs(2, 5, WIDTH), ALL)[0] < 3e-6
    ours, others = parts_of(path)
    assert sorted(ours) == [["MatMul"], ["MatMul"]]
    assert sorted(others) == ["Add", "Softmax"]


@pytest.mark.parametrize(
    "between",
    [
        [node("Mul", "y", "y", "square"), node("MatMul", "square", "b", "z")],
        [node("Add", "y", "one", "more"), node("MatMul", "more", "b", "z")],
        [
            node("ReduceMean", "y", "axis", "m"),
            node("Add", "y", "m", "c"),
            node("MatMul", "c", "b", "z"),
        ],
        [node("Add", "y", "row", "c"), node("MatMul", "c", "b", "z")],
    ],
    ids=["square", "scalar", "broadcast", "matrix"],
)
def test_what_is_not_token_by_token_is_left(tmp_path, between):
    constants = weights(a=(WIDTH, WIDE), b=(WIDE, WIDTH))
    constants |= {
        "one": np.float32(1),
        "axis": np.array([1]),
        "row": inputs(4, WIDE),
    }
    nodes = [node("MatMul", "x", "a", "y"), *between]
    path = saved(tmp_path, nodes, constants, WIDTH, opset=23)
    assert compared(path, inputs(2, 4, WIDTH), ALL)[0] < 3e-6
    ours, _ = parts_of(path)
    assert sorted(ours) == [["MatMul"], ["MatMul"]]


def random_graph(seed):
    """Operators of ours and others in random order, each on values made before."""
    random = np.random.default_rng(seed)
    values, nodes, constants = ["x"], [], weights()
    for index in range(14):
        name = f"v{index}"
        a, b = (values[int(random.integers(max(0, len(values) - 4), len(values)))] for _ in "ab")
        op = str(random.choice(["MatMul", "MatMul", "Add", "Mul", "Norm", "Sigmoid", "Tanh"]))
        if op == "MatMul":
            constants[f"w{index}"] = zeros_in((WIDTH, WIDTH), 0.7, index) / 8
            nodes.append(node("MatMul", a, f"w{index}", name))
        elif op == "Norm":
            nodes.append(node("RMSNormalization", a, "s192", name))
        else:
            nodes.append(node(op, *([a, b] if op in ("Add", "Mul") else [a]), name))
        values.append(name)
    return [*nodes, node("Add", values[-1], values[-2], "z")], constants


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_keep_their_results(tmp_path, seed):
    nodes, constants = random_graph(seed)
    path = saved(tmp_path, nodes, constants, WIDTH, opset=23)
    assert compared(path, inputs(2, 3, WIDTH), ALL)[0] < 2e-5
    if any(each.op_type == "MatMul" for each in nodes):
        assert parts_of(path)[0]


def test_different_leading_sizes_are_refused_or_left(tmp_path):
    """Two inputs that only broadcasting makes fit stay with onnxruntime."""
    graph = helper.make_graph(
        [node("MatMul", "x", "w", "y"), node("Add", "y", "r", "z")],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", WIDTH]),
            helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, "b", WIDTH]),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(zeros_in((WIDTH, WIDTH), 0.7), "w")],
    )
    path = tmp_path / "model.onnx"
    imports = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    feeds = {"x": inputs(2, 3, WIDTH), "r": inputs(1, 3, WIDTH)}
    ours = runtime.session(path, kernels=ALL).run(None, feeds)[0]
    wanted = runtime.session(path, kernels=False).run(None, feeds)[0]
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
