"""Attention with heads repeated and cache joined by nodes of their own, and without them."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile.attention_nodes import shorten_attention
from elsa_compile.grouped_heads import group_heads

HEADS, GROUPS, SIZE = 6, 2, 8
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def written_out(*, axis=2, groups=GROUPS, rotary=True, past=True, seen=False):
    """A model as torch.onnx writes grouped attention, from q, k and v (batch, length, all).

    Args:
        axis: where heads are repeated; 2 means each head by itself.
        seen: the joined keys are read by one more node.
    """
    nodes, known, constants = [], {}, {}

    def node(op, inputs, output, shape, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        known[output] = shape

    def constant(name, value):
        constants[name] = np.array(value, np.int64)
        return name

    for name, heads in (("q", HEADS), ("k", groups), ("v", groups)):
        split = constant(f"{name}_split", [0, 0, heads, SIZE])
        node("Reshape", [name, split], f"{name}_heads", ["b", "s", heads, SIZE])
        turned = ["b", heads, "s", SIZE]
        node("Transpose", [f"{name}_heads"], f"{name}_turned", turned, perm=[0, 2, 1, 3])
        if rotary and name != "v":
            inputs = [f"{name}_turned", "cos", "sin"]
            node("RotaryEmbedding", inputs, f"{name}_ready", turned, num_heads=heads)
        else:
            node("Identity", [f"{name}_turned"], f"{name}_ready", turned)
    for name in "kv":
        joined = f"present_{name}"
        if past:
            inputs = [f"past_{name}", f"{name}_ready"]
            node("Concat", inputs, joined, ["b", groups, "t", SIZE], axis=-2)
        else:
            node("Identity", [f"{name}_ready"], joined, ["b", groups, "t", SIZE])
        times = HEADS // groups
        wide = ["b", groups, times, "t", SIZE] if axis == 2 else ["b", times, groups, "t", SIZE]
        by = constant(f"{name}_by", [1 if isinstance(each, str) else each for each in wide])
        node("Unsqueeze", [joined, constant(f"{name}_axis", [axis])], f"{name}_one", None)
        known.pop(f"{name}_one")
        node("Expand", [f"{name}_one", by], f"{name}_wide", wide)
        whole = constant(f"{name}_whole", [0, HEADS, -1, SIZE])
        node("Reshape", [f"{name}_wide", whole], f"{name}_all", ["b", HEADS, "t", SIZE])
    node("Attention", ["q_ready", "k_all", "v_all", "mask"], "y", ["b", HEADS, "s", SIZE])
    node("Transpose", ["y"], "y_turned", ["b", "s", HEADS, SIZE], perm=[0, 2, 1, 3])
    flat = constant("flat", [0, 0, HEADS * SIZE])
    node("Reshape", ["y_turned", flat], "y_flat", ["b", "s", HEADS * SIZE])
    node("Identity", ["y_flat"], "z", ["b", "s", HEADS * SIZE])
    outputs = {"z": ["b", "s", HEADS * SIZE]}
    if past:
        outputs |= {f"present_{name}": ["b", groups, "t", SIZE] for name in "kv"}
    if seen:
        node("ReduceMax", ["present_k"], "top", [], keepdims=0)
        outputs["top"] = []
    info = helper.make_tensor_value_info
    inputs = [info("q", FLOAT, ["b", "s", HEADS * SIZE])]
    inputs += [info(name, FLOAT, ["b", "s", groups * SIZE]) for name in "kv"]
    inputs += [info("mask", TensorProto.BOOL, ["b", 1, "s", "t"])]
    if past:
        inputs += [info(f"past_{name}", FLOAT, ["b", groups, "p", SIZE]) for name in "kv"]
    if rotary:
        inputs += [info(name, FLOAT, ["b", "s", SIZE // 2]) for name in ("cos", "sin")]
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
        value_info=[info(n, FLOAT, s) for n, s in known.items() if n not in outputs],
    )
    imports = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def feeds(model, batch=2, length=3, past=5):
    random = np.random.default_rng(1)
    sizes = {"b": batch, "s": length, "p": past}
    names = {value.name for value in model.graph.input}
    sizes["t"] = length + (past if "past_k" in names else 0)
    made = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims]
        made[value.name] = random.standard_normal(shape).astype(np.float32)
    seen = np.arange(sizes["t"])[None] <= np.arange(length)[:, None] + sizes["t"] - length
    made["mask"] = np.broadcast_to(seen, (batch, 1, *seen.shape)).copy()
    made["mask"][1, :, :, 0] = past == 0
    return made


def run(model, inputs):
    opened = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(None, inputs), strict=True))


@pytest.mark.parametrize("rotary", [True, False])
def test_results_stay_and_nodes_go(rotary):
    model = written_out(rotary=rotary)
    changed = ir.from_proto(model)
    group_heads(changed)
    assert shorten_attention(changed) == 1
    short = ir.to_proto(changed)
    ops = [node.op_type for node in short.graph.node]
    assert "Expand" not in ops
    assert "Concat" not in ops
    for sizes in ({}, {"batch": 2, "length": 1}, {"batch": 2, "length": 4, "past": 1}):
        inputs = feeds(model, **sizes)
        wanted, found = run(model, inputs), run(short, inputs)
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            assert np.abs(value - found[name]).max() < 1e-5, name


def test_heads_stay_flat_where_nothing_stands_between():
    model = written_out()
    for node in model.graph.node:
        if node.op_type == "Concat" and node.input[1] == "v_ready":
            node.input[1] = "v_turned"
    changed = ir.from_proto(model)
    group_heads(changed)
    assert shorten_attention(changed) == 1
    short = ir.to_proto(changed)
    assert [node.op_type for node in short.graph.node if node.op_type != "Identity"] == [
        "RotaryEmbedding",
        "RotaryEmbedding",
        "Attention",
    ]
    inputs = feeds(model)
    wanted, found = run(model, inputs), run(short, inputs)
    assert all(np.abs(wanted[name] - found[name]).max() < 1e-5 for name in wanted)


def test_heads_repeated_as_a_whole_are_something_else():
    """0 1 0 1 0 1 instead of 0 0 0 1 1 1: not what the operator does."""
    changed = ir.from_proto(written_out(axis=1))
    group_heads(changed)
    shorten_attention(changed)
    assert "Expand" in [node.op_type for node in changed.graph]


def test_a_joined_cache_that_is_read_elsewhere_stays():
    model = written_out(seen=True)
    changed = ir.from_proto(model)
    group_heads(changed)
    shorten_attention(changed)
    assert "Concat" in [node.op_type for node in changed.graph]
    inputs = feeds(model)
    wanted, found = run(model, inputs), run(ir.to_proto(changed), inputs)
    assert all(np.abs(wanted[name] - found[name]).max() < 1e-5 for name in wanted)
