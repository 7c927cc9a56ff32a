"""Nodes that change nothing: gone, with results equal to the bit; and those that only look so."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile import export, frontend
from elsa_compile.needless_nodes import drop_needless
from elsa_compile.rotary_tables import widen_tables

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
# Nodes that read no weight first, of the tests' models of two layers. With all of torch.onnx's own
# nodes it was 99 for LLaMA. One of them subtracts sizes: that of a cache does not say its length.
NODES = {"llama": 54, "qwen3": 68, "gemma3": 74, "phi3": 56, "gpt2": 72, "opt": 57, "neox": 75}


def model(nodes, inputs, outputs, constants=(), known=()):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(np.array(v), n) for n, v in dict(constants).items()],
        value_info=[info(name, kind, shape) for name, (kind, shape) in dict(known).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(proto, feeds):
    opened = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return opened.run(None, feeds)


def ops(proto):
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("op_type", ["Expand", "Reshape"])
@pytest.mark.parametrize(
    ("before", "after", "stays"),
    [
        (["b", "s", 4], ["b", "s", 4], False),
        (["b", "s", 4], ["b", "t", 4], True),
        (["b", None, 4], ["b", None, 4], True),
        ([1, "s", 4], ["b", "s", 4], True),
    ],
)
def test_a_node_to_the_size_it_has_goes(op_type, before, after, stays):
    made = model(
        [helper.make_node(op_type, ["x", "shape"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        {"x": (FLOAT, before), "shape": (INT, [3])},
        {"z": (FLOAT, after)},
        known={"y": (FLOAT, after)},
    )
    changed = ir.from_proto(made)
    assert drop_needless(changed) == (0 if stays else 1)
    assert (op_type in ops(ir.to_proto(changed))) is stays


@pytest.mark.parametrize(
    ("constant", "stays"), [(True, False), (False, True), ([True, False], True)]
)
def test_and_with_true_is_the_other(constant, stays):
    made = model(
        [helper.make_node("And", ["c", "x"], ["y"]), helper.make_node("Not", ["y"], ["z"])],
        {"x": (BOOL, ["b", 2])},
        {"z": (BOOL, ["b", 2])},
        {"c": constant},
    )
    changed = ir.from_proto(made)
    drop_needless(changed)
    assert ("And" in ops(ir.to_proto(changed))) is stays
    feeds = {"x": np.array([[True, False], [True, True]])}
    assert np.array_equal(run(made, feeds), run(ir.to_proto(changed), feeds))


@pytest.mark.parametrize("axes", [([0], [0]), ([1, 2], [3]), ([0, -1], [-2, 1]), ([-1], [0, 2, 4])])
def test_two_unsqueezes_are_one(axes):
    rank = 2 + len(axes[0]) + len(axes[1])
    made = model(
        [
            helper.make_node("Unsqueeze", ["x", "a"], ["y"]),
            helper.make_node("Unsqueeze", ["y", "b"], ["w"]),
            helper.make_node("Neg", ["w"], ["z"]),
        ],
        {"x": (FLOAT, ["n", "m"])},
        {"z": (FLOAT, [None] * rank)},
        {"a": axes[0], "b": axes[1]},
    )
    changed = ir.from_proto(made)
    assert drop_needless(changed) == 1
    feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    (wanted,), (found,) = run(made, feeds), run(ir.to_proto(changed), feeds)
    assert wanted.shape == found.shape
    assert np.array_equal(wanted, found)


def gathered(start=0, swapped=False, columns="t"):
    """A mask (b, t) read at rows 0, 1, ... and columns start, ..., as transformers does it."""
    rows, cols = ("cols4", "rows4") if swapped else ("rows4", "cols4")
    nodes = [
        helper.make_node("Shape", ["mask"], ["b"], start=0, end=1),
        helper.make_node("Shape", ["mask"], ["t"], start=1, end=2),
        helper.make_node("Squeeze", ["b"], ["b0"]),
        helper.make_node("Squeeze", ["t"], ["t0"]),
        helper.make_node("Range", ["zero", "b0", "one"], ["rows"]),
        helper.make_node("Range", ["start", "t0", "one"], ["cols"]),
        helper.make_node("Unsqueeze", ["rows", "123"], ["rows4"]),
        helper.make_node("Unsqueeze", ["cols", "012"], ["cols4"]),
        helper.make_node("Max", ["rows4", "cols4"], ["most"]),
        helper.make_node("Shape", ["most"], ["whole"]),
        helper.make_node("Expand", [rows, "whole"], ["wide_rows"]),
        helper.make_node("Expand", [cols, "whole"], ["wide_cols"]),
        helper.make_node("Unsqueeze", ["wide_rows", "last"], ["rows5"]),
        helper.make_node("Unsqueeze", ["wide_cols", "last"], ["cols5"]),
        helper.make_node("Concat", ["rows5", "cols5"], ["places"], axis=-1),
        helper.make_node("GatherND", ["mask", "places"], ["read"]),
        helper.make_node("Not", ["read"], ["z"]),
    ]
    constants = {"zero": 0, "one": 1, "start": start, "last": [-1]}
    constants |= {"123": [1, 2, 3], "012": [0, 1, 2]}
    return model(
        nodes,
        {"mask": (BOOL, ["b", "t"])},
        {"z": (BOOL, None)},
        constants,
        {
            "rows": (INT, ["b"]),
            "cols": (INT, [columns]),
            "rows4": (INT, ["b", 1, 1, 1]),
            "cols4": (INT, [1, 1, 1, columns]),
            "read": (BOOL, ["b", 1, 1, columns]),
        },
    )


def test_a_mask_read_at_all_its_places_is_read_as_it_is():
    made = gathered()
    changed = ir.from_proto(made)
    drop_needless(changed)
    short = ir.to_proto(changed)
    assert ops(short) == ["Unsqueeze", "Not"]
    feeds = {"mask": np.array([[True, False, True], [False, False, True]])}
    (wanted,), (found,) = run(made, feeds), run(short, feeds)
    assert wanted.shape == found.shape == (2, 1, 1, 3)
    assert np.array_equal(wanted, found)


@pytest.mark.parametrize("other", [{"start": 1}, {"swapped": True}, {"columns": "fewer"}])
def test_a_mask_read_at_other_places_is_still_looked_up(other):
    changed = ir.from_proto(gathered(**other))
    drop_needless(changed)
    assert "GatherND" in ops(ir.to_proto(changed))


def rotated(angles, layers=2, named=True):
    """`layers` times queries and keys (b, 2, s, 8) with the angles of a value of this shape."""
    known = {"a": (FLOAT, angles)}
    nodes, inputs, outputs = [], {"a": (FLOAT, angles)}, {}
    for layer in range(layers):
        for each in "qk":
            name = f"{each}{layer}"
            nodes += [
                helper.make_node("Cos", ["a"], [f"{name}_cos"]),
                helper.make_node("Sin", ["a"], [f"{name}_sin"]),
                helper.make_node("Neg", [name], [f"{name}_n"]),
                helper.make_node(
                    "RotaryEmbedding", [f"{name}_n", f"{name}_cos", f"{name}_sin"], [f"{name}_r"]
                ),
            ]
            inputs[name] = (FLOAT, ["b", 2, "s", 8])
            outputs[f"{name}_r"] = (FLOAT, ["b", 2, "s", 8])
            if named:
                known[f"{name}_n"] = (FLOAT, ["b", 2, "s", 8])
    return model(nodes, inputs, outputs, known=known)


@pytest.mark.parametrize(
    ("angles", "named", "expands", "shapes"),
    [
        (["b", "s", 4], True, 0, 0),  # as many rows as the queries: nothing to do
        ([1, "s", 4], True, 2, 1),  # cos and sin once, for both layers, queries and keys
        ([1, "s", 4], False, 8, 4),  # nothing says that queries and keys have the same batch
    ],
)
def test_angles_get_their_batch_once(angles, named, expands, shapes):
    made = rotated(angles, named=named)
    changed = ir.from_proto(made)
    drop_needless(changed)
    assert widen_tables(changed) == expands
    wide = ir.to_proto(changed)
    found = ops(wide)
    assert (found.count("Expand"), found.count("Shape")) == (expands, shapes)
    assert (found.count("Cos"), found.count("Sin")) == (1, 1)
    random = np.random.default_rng(0)
    for batch in (1, 3):
        feeds = {
            value.name: random.standard_normal((batch, 2, 5, 8)).astype(np.float32)
            for value in made.graph.input
            if value.name != "a"
        }
        rows = batch if angles[0] == "b" else 1
        feeds["a"] = random.standard_normal((rows, 5, 4)).astype(np.float32)
        results = run(wide, feeds)
        every_row = {**feeds, "a": np.broadcast_to(feeds["a"], (batch, 5, 4)).copy()}
        wanted = run(rotated(["b", "s", 4]), every_row)
        assert all(np.array_equal(one, other) for one, other in zip(results, wanted, strict=True))


@pytest.mark.parametrize("family", NODES)
def test_an_exported_decoder_has_no_needless_nodes(family, make_family):
    """Their results are compared with torch in test_families."""
    graph = export.to_ir(frontend.from_module(make_family(family))).graph
    # Transposes of weights are the writer's affair.
    nodes = [node for node in graph if not node.inputs[0].is_initializer()]
    found = [node.op_type for node in nodes]
    assert not {"Expand", "GatherND"} & set(found)
    assert found.count("Cos") == found.count("Sin") == (family not in ("gpt2", "opt"))
    assert len(found) <= NODES[family]
    if family != "neox":  # which turns a part of each head before it cuts them up
        assert "Transpose" not in found
