"""Keys and values that are repeated for groups of query heads: read as they are instead."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import elsa_compile
from elsa_compile.grouped_heads import group_heads

B, KV, T, D = 2, 2, 5, 4


def repeated(times=3, axis=2, only_keys=False):
    """Attention over repeated heads, as transformers writes it."""
    wide = [B, KV, times, T, D] if axis == 2 else [B, times, KV, T, D]
    floats = {"k": [B, KV, T, D], "v": [B, KV, T, D], "q": [B, KV * times, 1, D]}
    if only_keys:
        floats["v"] = [B, KV * times, T, D]
    held = {"axes": [axis], "wide": wide, "all": [B, KV * times, T, D]}
    nodes, values = [], []
    for name in ("k",) if only_keys else ("k", "v"):
        nodes += [
            helper.make_node("Unsqueeze", [name, "axes"], [f"{name}1"]),
            helper.make_node("Expand", [f"{name}1", "wide"], [f"{name}2"]),
            helper.make_node("Reshape", [f"{name}2", "all"], [f"{name}3"]),
        ]
        values.append(helper.make_tensor_value_info(f"{name}2", TensorProto.FLOAT, wide))
        values.append(helper.make_tensor_value_info(f"{name}3", TensorProto.FLOAT, held["all"]))
    nodes.append(helper.make_node("Attention", ["q", "k3", "v" if only_keys else "v3"], ["y"]))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in floats.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [B, KV * times, 1, D])],
        [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in held.items()],
        value_info=values,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(model):
    opened = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(0)
    feeds = {
        i.name: random.standard_normal(i.shape).astype(np.float32) for i in opened.get_inputs()
    }
    return opened.run(None, feeds)[0]


@pytest.mark.parametrize("times", [1, 3])
def test_results_are_the_same_and_nothing_is_repeated(times):
    before = repeated(times)
    model = ir.serde.deserialize_model(before)
    assert group_heads(model) == 1
    after = ir.serde.serialize_model(model)
    assert [node.op_type for node in after.graph.node] == ["Attention"]
    onnx.checker.check_model(after)
    assert np.array_equal(run(before), run(after))


def test_other_repetitions_stay():
    """Whole sets of heads one after the other: another order. And keys alone."""
    for model in (repeated(axis=1), repeated(only_keys=True)):
        read = ir.serde.deserialize_model(model)
        assert group_heads(read) == 0
        assert len(read.graph) == len(model.graph.node)


def test_an_exported_decoder_repeats_no_heads(make_family, tmp_path):
    """Two key heads for four query heads; compile() itself compares with torch."""
    elsa_compile.compile(make_family("llama"), tmp_path / "model.onnx", "magnitude", sparsity=0.5)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    made = {output: node for node in nodes for output in node.output}
    found = [node for node in nodes if node.op_type == "Attention"]
    assert len(found) == 2
    for node in found:
        # Two heads as they come; the cache goes in by itself.
        assert made[node.input[1]].op_type == "RotaryEmbedding"
        assert made[node.input[2]].op_type == "MatMul"
        assert [name.startswith("past_key_values.") for name in node.input[4:]] == [True, True]
