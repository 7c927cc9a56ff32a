"""The bytes we write by hand against protobuf's own reader and writer."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, TensorProto, numpy_helper

from elsa_compile.onnx_wire import (
    Part,
    dense_field,
    dense_payload,
    nonzero_indices,
    pack_varints,
    raw_index_payload,
    sparse_field,
    values_payload,
    varint,
    varint_index_payload,
    varint_lengths,
)
from elsa_compile.weight_store import BLOCK_ELEMENTS, StoredWeight

# Where a varint grows by a byte, and the largest index there can be.
EDGES = [0, *((1 << bits) + d for bits in range(7, 63, 7) for d in (-1, 0)), 2**63 - 1]

sorted_indices = st.lists(
    st.one_of(st.integers(0, 2**63 - 1), st.integers(0, 300), st.sampled_from(EDGES)), unique=True
).map(lambda numbers: np.array(sorted(numbers), np.int64))


def joined(parts: list[Part]) -> bytes:
    return b"".join(
        part
        if isinstance(part, bytes)
        else b"".join(np.ascontiguousarray(c).view(np.uint8).tobytes() for c in part.chunks())
        for part in parts
    )


@settings(deadline=None)
@given(sorted_indices)
def test_varints_are_what_protobuf_packs(indices: Any) -> None:
    packed = pack_varints(indices).tobytes()
    assert varint_lengths(indices) == len(packed)
    field = b"" if not len(indices) else bytes([7 << 3 | 2]) + varint(len(packed)) + packed
    assert field == TensorProto(int64_data=indices.tolist()).SerializeToString()


def test_varints_at_every_change_of_length() -> None:
    indices = np.array(sorted(EDGES), np.int64)
    parsed = TensorProto.FromString(
        bytes([7 << 3 | 2]) + varint(varint_lengths(indices)) + pack_varints(indices).tobytes()
    )
    assert list(parsed.int64_data) == sorted(EDGES)


DTYPES = ["float32", "float16", "float64", "bfloat16", "int8", "uint8"]


@st.composite
def weights(draw: st.DrawFn) -> StoredWeight:
    """Any shape up to 4-D, any density, often transposed, with -0.0 and NaN among the floats."""
    import ml_dtypes

    name = draw(st.sampled_from(DTYPES))
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    floats = rng.standard_normal(shape) * 20
    floats *= rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    if dtype.kind not in "iu" and draw(st.booleans()):
        floats[rng.random(shape) < 0.2] = np.nan
    if name == "uint8":
        floats = np.abs(floats)
    array = floats.astype(dtype)
    if draw(st.booleans()):
        array = array.T
    return StoredWeight(array, dtype)


@settings(max_examples=200, deadline=None)
@given(weights(), st.booleans())
def test_a_sparse_field_reads_back(weight: StoredWeight, packed: bool) -> None:
    indices = np.concatenate([np.empty(0, np.int64), *nonzero_indices(weight)])
    payload = (
        varint_index_payload(weight, varint_lengths(indices))
        if packed
        else raw_index_payload(weight, len(indices))
    )
    values = values_payload(weight, len(indices))
    parts = sparse_field("w", weight, len(indices), values, payload, packed)
    graph = GraphProto.FromString(joined(parts))
    (sparse,) = graph.sparse_initializer
    assert sparse.values.name == "w"
    assert tuple(sparse.dims) == weight.shape
    dense = np.zeros(weight.size, weight.dtype)
    read = numpy_helper.to_array(sparse.indices)
    assert np.all(np.diff(read) > 0)
    dense[read] = numpy_helper.to_array(sparse.values)
    positive = weight.array + np.zeros((), weight.dtype)  # -0.0 + 0.0 is +0.0
    assert dense.tobytes() == positive.reshape(-1).tobytes()


@settings(max_examples=100, deadline=None)
@given(weights())
def test_a_dense_field_reads_back_bit_for_bit(weight: StoredWeight) -> None:
    graph = GraphProto.FromString(joined(dense_field("w", weight, dense_payload(weight))))
    (tensor,) = graph.initializer
    read = numpy_helper.to_array(tensor)
    assert read.shape == weight.shape
    assert read.tobytes() == np.ascontiguousarray(weight.array).tobytes()


@pytest.mark.parametrize(
    "shape", [(3, BLOCK_ELEMENTS // 2 + 5), (BLOCK_ELEMENTS // 3 + 7, 4), (2, 2, BLOCK_ELEMENTS)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_join_to_the_whole(shape: tuple[int, ...], transposed: bool) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    array = array.T if transposed else array
    weight = StoredWeight(array, np.dtype(np.float32))
    start = 0
    expected = np.ascontiguousarray(array).reshape(-1)
    for block in weight.blocks():
        assert block.ndim == 1
        assert len(block) <= BLOCK_ELEMENTS
        np.testing.assert_array_equal(block, expected[start : start + len(block)])
        start += len(block)
    assert start == array.size
    indices = np.concatenate(list(nonzero_indices(weight)))
    np.testing.assert_array_equal(indices, np.flatnonzero(expected))
