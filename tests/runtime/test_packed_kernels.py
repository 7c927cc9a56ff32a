"""Packed files on our kernels: what is claimed, exact values, and damaged bytes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile import runtime
from elsa_compile.runtime import kernels, provider
from elsa_compile.runtime.pack_file import pack_file
from elsa_compile.runtime.session import EXACT

pytestmark = pytest.mark.skipif(not kernels.available()[0], reason=kernels.available()[1])
RNG = np.random.default_rng(0)


def sparse(shape, sparsity, dtype=np.float32):
    values = RNG.standard_normal(shape)
    values = values * 40 if np.dtype(dtype).kind in "iu" else values
    return np.where(RNG.random(shape) < sparsity, 0, values).astype(dtype)


def packed(tmp_path, nodes, weights, x_shape, y_shape, x_type=TensorProto.FLOAT):
    """A packed file of these nodes, from x to y; weights: arrays or TensorProtos by name."""
    made = [
        weight if isinstance(weight, TensorProto) else numpy_helper.from_array(weight, name)
        for name, weight in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", x_type, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        made,
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "d.onnx")
    pack_file(tmp_path / "d.onnx", tmp_path / "p.onnx")
    return tmp_path / "p.onnx"


def both(path, x, options=None):
    """Results of our kernels and of stock onnxruntime, and what the provider did."""
    opened = runtime.session(path, 1, "cpu", config=EXACT, kernels=options or True)
    ours = opened.run(None, {"x": x})[0]
    claims = provider.claims()
    stock = runtime.session(path, 1, "cpu", config=EXACT, kernels=False)
    return ours, stock.run(None, {"x": x})[0], claims


def near(ours, stock):
    return np.abs(ours - stock).max() <= 1e-5 * np.abs(stock).max()


@pytest.mark.parametrize("form", ["bitmap", "sliced"])
@pytest.mark.parametrize("shape", [(96, 64), (70, 41), (129, 33)])
@pytest.mark.parametrize("kind", ["matmul", "gemm", "gemm turned", "float16", "bfloat16", "int8"])
def test_products(tmp_path, kind, shape, form):
    inputs, outputs = shape
    dtype = {"float16": np.float16, "int8": np.int8}.get(kind, np.float32)
    weight = sparse(shape, 0.8, dtype)
    weight[:, 3] = 0  # an output without weights
    weights = {"w": weight}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    if kind.startswith("gemm"):
        turned = kind == "gemm turned"
        weights = {"w": weight.T.copy() if turned else weight, "b": sparse((outputs,), 0)}
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=int(turned))]
    elif kind == "int8":
        weights["s"] = RNG.random(outputs).astype(np.float32)
        nodes[0].input[1] = "f"
        nodes.insert(0, helper.make_node("DequantizeLinear", ["w", "s"], ["f"], axis=1))
    elif kind in ("float16", "bfloat16"):
        nodes[0].input[1] = "f"
        nodes.insert(0, helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT))
    if kind == "bfloat16":
        halves = (weight.view(np.uint32) >> 16).astype(np.uint16)
        weights["w"] = TensorProto(
            name="w", data_type=TensorProto.BFLOAT16, dims=shape, raw_data=halves.tobytes()
        )
    path = packed(tmp_path, nodes, weights, ["m", inputs], ["m", outputs])
    x = RNG.standard_normal((3, inputs)).astype(np.float32)
    ours, stock, claims = both(path, x, {"format": form})
    assert [claim["format"] for claim in claims] == [form]
    assert near(ours, stock)
    assert claims[0]["nonzeros"] == np.count_nonzero(
        weight if kind != "bfloat16" else weight.view(np.uint32) >> 16
    )


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_lookups(tmp_path, kind):
    table = sparse((50, 37), 0.8)
    nodes = [helper.make_node("Gather", ["t", "x"], ["y"], name="look up")]
    number = TensorProto.INT32 if kind == np.int32 else TensorProto.INT64
    path = packed(tmp_path, nodes, {"t": table}, ["a", "b"], ["a", "b", 37], number)
    x = np.array([[0, 49, -1], [7, -50, 7]], kind)
    ours, stock, claims = both(path, x)
    assert [(claim["op"], claim["format"]) for claim in claims] == [("Gather", "bitmask")]
    assert (ours == table[x]).all()
    assert (stock == table[x]).all()
    opened = runtime.session(path, 1, "cpu", kernels=True)
    with pytest.raises(Exception, match="row 50 of a table of 50"):
        opened.run(None, {"x": np.array([[50]], kind)})


def test_other_readers_are_left_to_the_function(tmp_path):
    weight = sparse((64, 48), 0.8)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    path = packed(tmp_path, nodes, {"w": weight}, [64, 48], [64, 48])
    x = RNG.standard_normal((64, 48)).astype(np.float32)
    ours, stock, claims = both(path, x)
    assert claims == []
    assert (ours == stock).all()
    assert (ours == x + weight).all()


def test_a_weight_filled_with_something_else_is_left_to_the_function(tmp_path):
    whole = np.where(RNG.random((64, 48)) < 0.8, 5, sparse((64, 48), 0, np.int8)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=1),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    weights = {"w": whole, "s": np.ones(48, np.float32), "z": np.full(48, 5, np.int8)}
    path = packed(tmp_path, nodes, weights, ["m", 64], ["m", 48])
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    ours, stock, claims = both(path, x)
    assert [claim["format"] for claim in claims] == ["dense"]
    assert "zero" in claims[0]["why"]
    assert near(ours, stock)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("w.mask", lambda data: data[:-1], "mask of 383 bytes for 3072 entries"),
        ("w.values", lambda data: data[:-4], "values for"),
        ("w.values", lambda data: data + data[-4:], "values for"),
    ],
)
def test_the_provider_itself_refuses_damaged_bytes(tmp_path, part, change, said):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = packed(tmp_path, nodes, {"w": sparse((64, 48), 0.8)}, ["m", 64], ["m", 48])
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == part)
    tensor.raw_data = change(tensor.raw_data)
    tensor.dims[0] = len(tensor.raw_data) // (1 if part == "w.mask" else 4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_provider_for_devices(provider.devices(onnxruntime), {})
    with pytest.raises(Exception, match=said):
        onnxruntime.InferenceSession(model.SerializeToString(), options)
