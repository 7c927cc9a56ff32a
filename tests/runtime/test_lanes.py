"""Lanes, the second form of weights with few non-zeros: when they are made, what they give."""

import numpy as np
import pytest
from onnx import helper

from elsa_compile.runtime import kernels, packed, reference
from tests.runtime.test_provider import MATMUL, compared, inputs, saved, zeros_in
from tests.runtime.test_value_types import ALLOWED


def scattered(rows, columns, density):
    """Non-zeros anywhere, as many in one row as in another but for chance."""
    random = np.random.default_rng(8)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    weight[random.random((rows, columns)) >= density] = 0
    return weight


@pytest.mark.parametrize("rows", [1, 95, 97, 200])
@pytest.mark.parametrize("columns", [64, 255, 256, 257, 513, 577])
def test_lanes_give_the_sums_of_bitmaps(rows, columns, monkeypatch):
    """Integers and their rounding are the same on every path."""
    if kernels.isa() != "avx512vnni":
        pytest.skip("lanes need AVX-512 with VBMI and VNNI")
    random = np.random.default_rng(7)
    weight = scattered(rows, columns, 0.08)
    weight[rows // 2] = 0
    lanes = packed.pack(weight, "bitmap", "int8")
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, "avx2")
    bitmap = packed.pack(weight, "bitmap", "int8")
    assert bitmap.lane_bytes == 0
    assert lanes.lane_bytes > 0 or rows in (1, 97) or columns == 64  # mostly heads
    bias = random.standard_normal(rows).astype(np.float32)
    for tokens in (1, 2, 4, 8, 9) if lanes.lane_bytes else (1, 2, 4):
        x = random.standard_normal((tokens, columns)).astype(np.float32)
        found = lanes.multiply(x, bias, "int16")
        each = [bitmap.multiply(x[m : m + 1], bias, "int16") for m in range(tokens)]
        np.testing.assert_allclose(found, np.concatenate(each), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [95, 200])
@pytest.mark.parametrize("columns", [127, 256, 330])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lanes_of_floats(rows, columns, dtype):
    random = np.random.default_rng(9)
    weight = scattered(rows, columns, 0.1)
    kept = packed.pack(weight, "bitmap", dtype)
    assert (kept.lane_bytes > 0) == (kept.isa == "avx512vnni")
    truth = reference.stored(weight, dtype)
    for tokens in (1, 2, 4, 8, 9):
        x = (random.standard_normal((tokens, columns)) * 1e3).astype(np.float32)
        x[:, ::7] = -1e-30
        bias = random.standard_normal(rows).astype(np.float32)
        wanted = reference.matmul(x, truth) + bias
        bound = reference.error_bound(x, truth) + 3 * 2.0**-24 * np.abs(wanted)
        bound += 2.0**-23 * np.abs(bias)
        assert (np.abs(kept.multiply(x, bias) - wanted) <= bound).all()


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_lanes_are_made_of_few_nonzeros_however_they_lie(dtype):
    """One full row among empty ones is cut into many lanes; 0.4 are too many non-zeros."""
    crowded = np.zeros((200, 512), np.float32)
    crowded[5] = np.arange(1, 513) / 512
    kept = packed.pack(crowded, "bitmap", dtype)
    spread = packed.pack(scattered(200, 512, 0.1), "bitmap", dtype)
    for few in (kept, spread):
        assert (few.lane_bytes > 0) == (kernels.isa() == "avx512vnni")
    assert kept.lane_bytes < 0.2 * spread.lane_bytes or kept.isa != "avx512vnni"
    assert packed.pack(scattered(96, 256, 0.4), "bitmap", dtype).lane_bytes == 0
    x = np.ones((2, 512), np.float32)
    wanted = reference.matmul(x, reference.stored(crowded, dtype))
    np.testing.assert_allclose(kept.multiply(x, activations="int16"), wanted, rtol=1e-4)


@pytest.mark.parametrize("values", ["float32", "int8"])
def test_threads_share_lanes(tmp_path, values):
    """Two products of one input, one with lanes and one without; several tasks each."""
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}z"], name=name) for name in "wv"]
    nodes.append(helper.make_node("Concat", ["wz", "vz"], ["z"], axis=-1))
    weights = {"w": zeros_in((1100, 900), 0.9), "v": zeros_in((1100, 500), 0.5)}
    path = saved(tmp_path, nodes, weights, 1100)
    for tokens in (1, 3):
        difference, claims = compared(
            path, inputs(1, tokens, 1100), {"values": values, "format": "bitmap"}, threads=2
        )
        assert difference < ALLOWED[values]
        several_tasks = claims["w"]["lane_bytes"] > 4 * 2**15
        assert several_tasks == (kernels.isa() == "avx512vnni")
        assert claims["v"]["lane_bytes"] == 0


@pytest.mark.parametrize("values", ["float32", "int8"])
def test_lanes_can_be_left_out(tmp_path, values):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((577, 203), 0.9)}, 577)
    wanted = "auto" if kernels.isa() == "avx512vnni" else "none"
    for lanes in ("auto", "none"):
        options = {"values": values, "lanes": lanes, "format": "bitmap"}
        difference, claims = compared(path, inputs(1, 1, 577), options)
        assert difference < ALLOWED[values]
        assert (claims["product"]["lane_bytes"] > 0) == (lanes == wanted == "auto")


@pytest.mark.skipif(kernels.isa() == "portable", reason="portable kernels have no lanes")
def test_without_lanes_the_fastest_form_is_another(tmp_path):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((577, 203), 0.97)}, 577)
    _, claims = compared(path, inputs(1, 1, 577), {"lanes": "none"})
    assert claims["product"]["format"] == "sliced"
    assert claims["product"]["lane_bytes"] == 0
