"""elsa-run explain on files whose zeros are known: forms, readers, reasons, hostile input."""

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile.errors import UserInputError
from elsa_compile.runtime import kernels, packed
from elsa_compile.runtime.cli import main
from elsa_compile.runtime.expected_gain import expected_gain, matrices_gain
from elsa_compile.runtime.explain import explain, narrowest_type

K, N = 256, 128


def matrix(sparsity, seed=0, shape=(K, N)):
    """Random with exactly this fraction of zeros."""
    random = np.random.default_rng(seed)
    values = random.uniform(0.5, 1.0, np.prod(shape)).astype(np.float32)
    values[random.permutation(values.size)[: round(sparsity * values.size)]] = 0
    return values.reshape(shape)


def write(folder, nodes, initializers=(), sparse=(), name="model.onnx", functions=()):
    """A file with input x (batch, K) and output y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) if isinstance(v, np.ndarray) else v
         for n, v in initializers],
        sparse_initializer=list(sparse),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / name)
    return folder / name


def coo(values, name):
    flat = values.reshape(-1)
    where = np.flatnonzero(flat)
    return helper.make_sparse_tensor(
        numpy_helper.from_array(flat[where], name),
        numpy_helper.from_array(where.astype(np.int64), f"{name}_indices"),
        values.shape,
    )


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


def only(found):
    assert len(found["weights"]) == 1
    return found["weights"][0]


def codes(found):
    return [reason["code"] for reason in found["reasons"]]


def test_zeros_stored_dense_are_found(tmp_path):
    found = explain(write(tmp_path, [MATMUL], [("w", matrix(0.7))]))
    weight = only(found)
    assert (weight["zeros"], weight["form"], weight["role"]) == (
        round(0.7 * K * N),
        "dense",
        "product",
    )
    assert (weight["rows"], weight["columns"]) == (N, K)
    assert weight["expected_gain"] == pytest.approx(2.5, rel=1e-3)
    assert codes(found)[0] == ("stock-runtime" if kernels.available()[0] else "no-kernels")
    assert "stored-dense" in codes(found)


def test_values_of_two_bytes_are_expected_to_gain_as_such(tmp_path):
    """Where the provider keeps them so: it and explain agree."""
    weight = matrix(0.8).astype(ml_dtypes.bfloat16).astype(np.float32)
    found = only(explain(write(tmp_path, [MATMUL], [("w", weight)])))
    kept = "bfloat16"
    if kernels.available()[0]:
        kept = packed.kept_type(N, K, np.count_nonzero(weight), kept)
    assert found["dtype"] == "float32"
    assert found["expected_gain"] == expected_gain(kept, float((weight != 0).mean()))
    assert narrowest_type(weight) == "bfloat16"
    assert narrowest_type(np.float32([1 + 2.0**-9])) == "float16"
    assert narrowest_type(np.float32([1 + 2.0**-20])) == "float32"
    assert narrowest_type(np.float32([1e6 + 1])) == "float32"


def test_a_sparse_initializer_is_expanded_by_onnxruntime(tmp_path):
    found = explain(write(tmp_path, [MATMUL], sparse=[coo(matrix(0.9), "w")]))
    weight = only(found)
    assert (weight["form"], weight["zeros"]) == ("coo", round(0.9 * K * N))
    assert weight["stored_bytes"] < weight["dense_bytes"] == K * N * 4
    assert "expanded-at-load" in codes(found)
    assert "stored-dense" not in codes(found)


def test_without_zeros_it_says_so(tmp_path):
    found = explain(write(tmp_path, [MATMUL], [("w", matrix(0.0))]))
    assert codes(found) == ["not-pruned"]
    assert "masks were not applied" in found["answer"]


def test_too_few_zeros(tmp_path):
    found = explain(write(tmp_path, [MATMUL], [("w", matrix(0.3))]))
    assert codes(found)[0] == "too-few-zeros"
    assert "30%" in found["answer"]
    assert only(found)["used_by"] == ()


def test_without_the_library_the_answer_is_why(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: (False, "it was not built"))
    found = explain(write(tmp_path, [MATMUL], [("w", matrix(0.8))]))
    assert codes(found)[0] == "no-kernels"
    assert "it was not built" in found["answer"]
    assert only(found)["kernel"] is None


def test_a_mask_that_torch_left_in_the_graph_counts(tmp_path):
    """torch.nn.utils.prune without remove(): weight_orig * weight_mask."""
    mask = (matrix(0.8) != 0).astype(np.float32)
    nodes = [helper.make_node("Mul", ["orig", "mask"], ["w"]), MATMUL]
    path = write(tmp_path, nodes, [("orig", matrix(0.0)), ("mask", mask)])
    weight = explain(path)["weights"][0]
    assert weight["name"] == "orig"
    assert weight["zeros"] == round(0.8 * K * N)
    assert weight["readers"] == ("Mul > MatMul",)


def test_a_tied_head_is_a_product(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    weight = only(explain(write(tmp_path, nodes, [("w", matrix(0.9, shape=(N, K)))])))
    assert (weight["role"], weight["rows"], weight["columns"]) == ("product", N, K)
    assert "Transpose > MatMul" in weight["readers"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_in_both_layouts(tmp_path, transposed):
    values = matrix(0.6)
    values[5] = 0  # the input 5 goes nowhere
    values[:, 7] = 0
    values[:, 9] = 0
    stored = np.ascontiguousarray(values.T) if transposed else values
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=transposed)
    path = write(tmp_path, [node], [("w", stored), ("b", np.ones(N, np.float32))])
    weight = only(explain(path))
    assert (weight["dead_rows"], weight["dead_columns"]) == (2, 1)
    assert weight["zeros"] == int((values == 0).sum())


def test_two_of_four_is_along_the_inputs(tmp_path):
    values = matrix(0.0)
    values[0::4] = values[2::4] = 0
    found = explain(write(tmp_path, [MATMUL], [("w", values)]))
    assert only(found)["two_of_four"]
    assert "two-of-four" in codes(found)
    across = matrix(0.0)
    across[:, 0::4] = across[:, 2::4] = 0  # two of four outputs: not what hardware executes
    assert not only(explain(write(tmp_path, [MATMUL], [("w", across)])))["two_of_four"]


def quantised(scale, zero=None, **attributes):
    whole = np.round(matrix(0.8) * 100).astype(np.int8)
    inputs = ["w", "scale", *(["zero"] if zero is not None else [])]
    nodes = [
        helper.make_node("DequantizeLinear", inputs, ["wide"], **attributes),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    held = [("w", whole), ("scale", scale), *([("zero", zero)] if zero is not None else [])]
    return nodes, held


def test_int8_with_a_scale_for_each_output_has_a_kernel(tmp_path):
    nodes, held = quantised(np.full(N, 0.01, np.float32), axis=1)
    weight = only(explain(write(tmp_path, nodes, held)))
    assert (weight["form"], weight["why"]) == ("int8", "")
    assert weight["zeros"] == round(0.8 * K * N)
    assert weight["expected_gain"] == pytest.approx(9.5 / 4.0, rel=1e-3)


@pytest.mark.parametrize(
    ("scale", "zero", "attributes", "why"),
    [
        (np.full((K // 32, N), 0.01, "f"), None, {"axis": 0, "block_size": 32}, "other scales"),
        (np.full(N, 0.01, "f"), np.full(N, 50, np.int8), {"axis": 1}, "zero point"),
    ],
)
def test_int8_that_no_kernel_reads(tmp_path, scale, zero, attributes, why):
    nodes, held = quantised(scale, zero, **attributes)
    found = explain(write(tmp_path, nodes, held))
    weight = found["weights"][0]
    assert why in weight["why"]
    assert weight["expected_gain"] == 1.0
    # Zeros are what the product sees: of a zero point of 50, the entries that are 50.
    whole = held[0][1]
    assert weight["zeros"] == int((whole == (0 if zero is None else 50)).sum())
    if zero is None:
        assert codes(found)[0] == "no-kernel-for-it"


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_matmulnbits_are_counted(tmp_path, bits):
    middle = 1 << (bits - 1)
    whole = np.full((N, K), middle, np.uint8)
    whole[:, :10] = middle + 1
    stored = whole if bits == 8 else (whole[:, 0::2] | whole[:, 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft",
        K=K, N=N, bits=bits, block_size=32,
    )  # fmt: skip
    held = [
        ("w", stored.reshape(N, K // 32, -1)),
        ("scales", np.ones((N, K // 32), np.float32)),
    ]
    weight = explain(write(tmp_path, [node], held))["weights"][0]
    assert (weight["form"], weight["zeros"]) == (f"int{bits}", N * (K - 10))
    assert "MatMulNBits" in weight["why"]


def test_an_unpruned_head_bounds_the_whole(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "head"], ["y"]),
    ]
    held = [("w", matrix(0.9)), ("head", matrix(0.0, shape=(N, K)))]
    found = explain(write(tmp_path, nodes, held))
    assert found["products"]["expected_gain"] == pytest.approx(1 / (0.5 / 6.0 + 0.5), rel=1e-3)
    rest = next(r["sentence"] for r in found["reasons"] if r["code"] == "dense-rest")
    assert "'head'" in rest
    assert "50% of the entries" in rest


def test_a_model_without_products(tmp_path):
    node = helper.make_node("Add", ["x", "w"], ["y"])
    found = explain(write(tmp_path, [node], [("w", matrix(0.9, shape=(1, K)))]))
    assert codes(found) == ["no-products"]


def test_the_table_of_gains():
    assert expected_gain("float32", 0.5) == 1.6
    assert expected_gain("float32", 0.25) == pytest.approx((2.5 + 3.3) / 2)
    assert expected_gain("float32", 0.51) == 1.0
    assert expected_gain("float32", 0.0) == 11.0
    assert expected_gain("int8", 0.2) == pytest.approx(9.5 / 4)
    assert expected_gain("float64", 0.1) == 1.0
    assert matrices_gain([(10, "float32", 3.0), (10, "float32", 1.0)]) == pytest.approx(1.5)
    assert matrices_gain([]) == 1.0


def test_text_and_json_of_the_command(tmp_path, capsys):
    path = write(tmp_path, [MATMUL], [("w", matrix(0.7))])
    assert main(["explain", str(path)]) == 0
    text = capsys.readouterr().out
    assert "70.0%" in text
    assert "why it is not faster" in text
    assert main(["explain", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == found["reasons"][0]["sentence"]


# --- Hostile files ----------------------------------------------------------------------------


def refused(capsys, path):
    assert main(["explain", str(path)]) == 2
    said = capsys.readouterr().err
    assert "internal error" not in said
    assert str(path) in said
    return said


def test_a_sparse_weight_that_claims_terabytes_is_counted_not_made(tmp_path, capsys):
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 9]), "i")
    sparse = helper.make_sparse_tensor(values, indices, [1 << 20, 1 << 21])
    weight = only(explain(write(tmp_path, [MATMUL], sparse=[sparse])))
    assert weight["zeros"] == (1 << 41) - 2
    assert weight["rows"] == 0


def test_quantised_weights_that_lie_about_their_size(tmp_path, capsys):
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=1 << 40, N=N, bits=4, block_size=32,
    )  # fmt: skip
    held = [("w", np.zeros((N, 8, 16), np.uint8)), ("s", np.ones((N, 8), np.float32))]
    assert "are not N=128" in refused(capsys, write(tmp_path, [node], held))


def test_scales_that_do_not_fit(tmp_path, capsys):
    nodes, held = quantised(np.ones(N + 1, np.float32), axis=1)
    assert "cannot be computed" in refused(capsys, write(tmp_path, nodes, held))


def test_blocks_of_absurd_length(tmp_path, capsys):
    scale = np.ones((2, N), np.float32)
    nodes, held = quantised(scale, axis=0, block_size=1 << 60)
    assert "for blocks of" in refused(capsys, write(tmp_path, nodes, held))


def test_a_product_that_would_grow_is_not_made(tmp_path, capsys):
    nodes = [helper.make_node("Mul", ["a", "b"], ["w"]), MATMUL]
    held = [("a", np.ones((1 << 16, 1), np.float32)), ("b", np.ones((1, 1 << 16), np.float32))]
    assert "larger" in refused(capsys, write(tmp_path, nodes, held))


def test_doubling_chains_and_circles_end(tmp_path):
    nodes = [helper.make_node("Mul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(60)]
    nodes += [
        helper.make_node("Mul", ["c", "d"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["z"]),
    ]
    nodes += [helper.make_node("MatMul", ["x", "m60"], ["y"])]
    found = explain(write(tmp_path, nodes, [("m0", matrix(0.5)), ("c", matrix(0.5))]))
    assert {weight["name"] for weight in found["weights"]} == {"m0", "c"}


def test_random_damage_never_crashes(tmp_path, capsys):
    random = np.random.default_rng(0)
    nodes, held = quantised(np.full(N, 0.01, np.float32), axis=1)
    sound = write(tmp_path, nodes, held).read_bytes()
    # Where the structure is: the values themselves cannot be wrong.
    start, end = sound.index(b"DequantizeLinear") - 60, sound.index(b"DequantizeLinear") + 120
    places = np.r_[0:60, max(start, 0) : end, len(sound) - 600 : len(sound)]
    codes = set()
    for _ in range(200):
        damaged = bytearray(sound)
        for place in random.choice(places, random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        (tmp_path / "model.onnx").write_bytes(bytes(damaged))
        codes.add(main(["explain", str(tmp_path)]))
        assert "internal error" not in capsys.readouterr().err, bytes(damaged)
    assert codes == {0, 2}


# --- Measured gains ---------------------------------------------------------------------------


def test_measured_gains_are_of_the_products_that_both_runs_name(tmp_path, capsys):
    """Two products of one input, which are one node on our kernels, and one that stays dense."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], name="first"),
        helper.make_node("MatMul", ["x", "b"], ["q"], name="second"),
        helper.make_node("Mul", ["p", "q"], ["r"], name="times"),
        helper.make_node("MatMul", ["r", "c"], ["y"], name="whole"),
    ]
    square = (K, K)
    held = [
        ("a", matrix(0.9, 0, square)),
        ("b", matrix(0.9, 1, square)),
        ("c", matrix(0, 2, square)),
    ]
    path = write(tmp_path, nodes, held)
    assert main(["explain", str(path), "--measure", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"]["workload"] == "run"
    assert found["measured"]["gain"] > 0
    gains = {weight["node"]: weight["measured_gain"] for weight in found["weights"]}
    assert set(gains) == {"first", "second", "whole"}
    assert gains["whole"] is None or gains["whole"] > 0  # a node of a microsecond or less has none
    if gains["first"] is not None:
        assert gains["first"] == gains["second"]
    assert main(["explain", str(path), "--measure", "--threads", "1"]) == 0
    assert "measured with our kernels over stock onnxruntime" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(tmp_path, monkeypatch):
    path = write(tmp_path, [MATMUL], [("w", matrix(0.9))])
    with pytest.raises(UserInputError, match="--threads is of --measure"):
        explain(path, threads=1)
    monkeypatch.setattr(kernels, "_load", lambda: (None, "it was not built"))
    with pytest.raises(UserInputError, match="--measure: native kernels: it was not built"):
        explain(path, measure=True)
