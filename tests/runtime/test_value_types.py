"""Types in which the provider keeps values: their accuracy, and when two bytes are enough."""

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from elsa_compile import runtime
from elsa_compile.runtime import kernels, packed, provider
from elsa_compile.runtime.pack_file import pack_file
from tests.runtime.test_provider import ISAS, MATMUL, compared, inputs, saved, zeros_in


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Each instruction set that this processor has."""
    monkeypatch.delenv(kernels.ISA_ENVIRONMENT, raising=False)
    if request.param not in ISAS[: ISAS.index(kernels.isa()) + 1]:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, request.param)
    return request.param


ALLOWED = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4, "int8": 2e-2}  # rounding of values


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_every_instruction_set_and_value_type(tmp_path, isa, values):
    path = saved(tmp_path, MATMUL, {"w": zeros_in((320, 96), 0.7)}, 320)
    allowed = 1e-6 if values == "float32" else ALLOWED[values]
    for shape in ((1, 1), (1, 33)):
        options = {"values": values, "least_gain": "0"}
        difference, claims = compared(path, inputs(*shape, 320), options)
        assert difference < allowed
        assert claims["product"]["format"] != "dense"
        assert (difference > 1e-5) == (values != "float32")


@pytest.mark.parametrize("tokens", [1, 2, 7, 20, 300])
@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_a_weight_without_zeros_can_be_kept_in_rows(tmp_path, values, tokens):
    path = saved(tmp_path, MATMUL, {"w": inputs(130, 577, seed=3)}, 130)
    options = {"values": values, "format": "rows", "least_gain": "0"}
    difference, claims = compared(path, inputs(1, tokens, 130), options)
    assert claims["product"]["format"] == "rows"
    assert claims["product"]["nonzeros"] > 130 * 577 * 0.99
    assert difference < ALLOWED[values]
    assert (difference > 1e-5) == (values != "float32")


def held_in(values, kind):
    """Float32 values that are numbers of a smaller type."""
    return values.astype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[kind]).astype("f4")


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("sparsity", [0.6, 0.9])
def test_two_bytes_are_kept_of_values_that_need_no_more(tmp_path, isa, kind, sparsity):
    weight = held_in(zeros_in((577, 203), sparsity), kind)
    path = saved(tmp_path, MATMUL, {"w": weight}, 577)
    for tokens in (1, 3, 8, 100):
        difference, claims = compared(path, inputs(tokens, 1, 577), {"least_gain": "0"})
        assert difference < 2e-6  # nothing is rounded
    claim = claims["product"]
    assert claim["type"] == packed.kept_type(203, 577, claim["nonzeros"], kind)
    if kind == "bfloat16" and isa != "portable":
        assert claim["type"] == kind
    wide = compared(path, inputs(1, 1, 577), {"values": "float32", "least_gain": "0"})[1]
    assert wide["product"]["type"] == "float32"
    if claim["type"] == kind:
        assert claim["bytes"] < 0.8 * wide["product"]["bytes"]


def test_one_value_that_needs_four_bytes_keeps_all(tmp_path):
    weight = held_in(zeros_in((577, 203), 0.6), "bfloat16")
    weight[576, 202] = np.float32(1 + 2.0**-20)
    path = saved(tmp_path, MATMUL, {"w": weight}, 577)
    difference, claims = compared(path, inputs(1, 1, 577), {"least_gain": "0"})
    assert claims["product"]["type"] == "float32"
    assert difference < 2e-6


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_numbers_at_the_ends_of_the_small_types_stay(tmp_path, isa, kind):
    ends = ml_dtypes.finfo(kind)
    weight = held_in(zeros_in((256, 128), 0.9), kind)
    edge = [float(ends.max) / 4, float(ends.smallest_subnormal), -float(ends.smallest_normal)]
    for column, value in enumerate(edge):
        weight[:, column] = 0
        weight[7, column] = value
    path = saved(tmp_path, MATMUL, {"w": weight}, 256)
    x = np.zeros((1, 1, 256), np.float32)
    x[0, 0, 7] = 2.0 ** (1 if kind == "float16" else -3)
    opened = runtime.session(path, kernels={"least_gain": "0"})
    (claim,) = provider.claims()
    assert claim["type"] == packed.kept_type(128, 256, np.count_nonzero(weight), kind)
    found = opened.run(None, {"x": x})[0][0, 0, :3]
    assert np.array_equal(found, np.float32(edge) * x[0, 0, 7])


def test_products_of_one_input_may_be_kept_in_different_types(tmp_path):
    weights = {
        "a": zeros_in((577, 203), 0.9),
        "b": held_in(zeros_in((577, 203), 0.9, 1), "bfloat16"),
        "c": held_in(zeros_in((577, 203), 0.9, 2), "float16"),
        "d": held_in(zeros_in((577, 203), 0.6, 3), "bfloat16"),
    }
    nodes = [helper.make_node("MatMul", ["x", n], [f"y{n}"], name=n) for n in weights]
    nodes.append(helper.make_node("Sum", [f"y{n}" for n in weights], ["z"]))
    path = saved(tmp_path, nodes, weights, 577)
    for tokens in (1, 2, 5, 40):
        difference, claims = compared(path, inputs(1, tokens, 577), {"least_gain": "0"})
        assert difference < 3e-6
    kinds = {"a": "float32", "b": "bfloat16", "c": "float16", "d": "bfloat16"}
    for name, kind in kinds.items():
        claim = claims[name]
        assert claim["type"] == packed.kept_type(203, 577, claim["nonzeros"], kind)


def test_what_a_file_holds_packed_in_four_bytes_is_kept_in_two(tmp_path):
    weight = held_in(zeros_in((577, 203), 0.6), "bfloat16")
    path = saved(tmp_path, MATMUL, {"w": weight}, 577)
    smaller = tmp_path / "packed.onnx"
    pack_file(path, smaller)
    difference, claims = compared(smaller, inputs(2, 3, 577))
    assert difference < 2e-6
    assert claims["product"]["type"] == packed.kept_type(
        203, 577, np.count_nonzero(weight), "bfloat16", whole=False
    )
