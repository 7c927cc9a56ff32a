"""Caches with room, past and present in one piece of memory: the same scores, nothing copied."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import elsa_compile
from elsa_compile import runtime
from elsa_compile.runtime import kernels
from elsa_compile.runtime.decoder import Decoder, open_decoder
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.session import decoding_session, shares_caches

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
pytestmark = pytest.mark.skipif(
    kernels.available()[0] and kernels.isa() == "portable",
    reason="only kernels with vectors do attention",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The demo model at 80 % zeros."""
    pytest.importorskip("torch", reason="compiling needs torch")
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    elsa_compile.compile(TINY, path, "magnitude", sparsity=0.8)
    return path


def both(path):
    """With shared caches, and as onnxruntime does it by itself."""
    ours, _ = open_decoder(path, 1, "cpu")
    return ours, Decoder(runtime.session(path, threads=1, kernels=False), path)


def near(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keep", [0, 1])
def test_scores_are_those_of_copied_caches(tiny, batch, keep):
    ours, plain = both(tiny)
    assert ours.shares
    assert not plain.shares
    random = np.random.default_rng(batch)
    a, b = ours.start(batch), plain.start(batch)
    for length in (1, 5, 1, 60, 1, 1, 90, 3, 1):
        ids = random.integers(0, 1000, (batch, length))
        near(ours.extend(a, ids, keep=keep), plain.extend(b, ids, keep=keep))
        assert a.length == b.length <= a.room
    assert a.cache[0].shape[2] == a.room


def test_padded_batches(tiny):
    ours, plain = both(tiny)
    random = np.random.default_rng(0)
    ids, mask = random.integers(0, 1000, (2, 9)), np.ones((2, 9), int)
    mask[1, :4] = 0
    a, b = ours.start(2, 20), plain.start(2)
    near(ours.extend(a, ids, mask)[:, -1], plain.extend(b, ids, mask)[:, -1])
    assert a.room == 64  # the least
    for _ in range(3):
        ids = random.integers(0, 1000, (2, 1))
        near(ours.extend(a, ids), plain.extend(b, ids))


def test_a_step_writes_its_own_keys_and_nothing_else(tiny):
    ours, _ = open_decoder(tiny, 1, "cpu")
    state = ours.start(1, 100)
    ours.extend(state, np.arange(20)[None])
    memory = [value.ctypes.data for value in state.cache]
    before = [value.copy() for value in state.cache]
    ours.extend(state, np.array([[7]]))
    assert [value.ctypes.data for value in state.cache] == memory
    assert not any(place % 64 for place in memory)
    for old, now in zip(before, state.cache, strict=True):
        assert np.array_equal(now[:, :, :20], old[:, :, :20])
        assert np.any(now[:, :, 20] != 0)
        assert np.array_equal(now[:, :, 21:], old[:, :, 21:], equal_nan=True)


def test_branches_go_their_own_ways(tiny):
    for decoder in both(tiny):
        state = decoder.start(1)
        decoder.extend(state, np.arange(30)[None])
        branch = decoder.branch(state)
        mine = decoder.extend(decoder.branch(state), np.array([[5]]))
        decoder.extend(branch, np.array([[77]]))
        assert np.array_equal(decoder.extend(state, np.array([[5]])), mine)
        assert state.length == branch.length == 31


def test_a_graph_that_reads_the_size_of_its_cache_gets_copies(tiny, tmp_path):
    model = onnx.load(tiny)
    model.graph.node.append(helper.make_node("Shape", ["past_key_values.0.key"], ["size"]))
    model.graph.output.append(helper.make_tensor_value_info("size", TensorProto.INT64, [4]))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    ours, plain = both(path)
    assert not ours.shares
    a, b = ours.start(), plain.start()
    for length in (4, 1, 70, 1):
        ids = np.full((1, length), 3)
        near(ours.extend(a, ids), plain.extend(b, ids))
    assert a.room == 0


def test_long_contexts_on_several_threads(tiny):
    """More than one span of keys, and what a failed step leaves is overwritten by the next."""
    ours, _ = open_decoder(tiny, 3, "cpu")
    plain = Decoder(runtime.session(tiny, threads=1, kernels=False), tiny)
    a, b = ours.start(2, 1200), plain.start(2)
    ids = np.random.default_rng(1).integers(0, 1000, (2, 1130))
    near(ours.extend(a, ids, keep=1), plain.extend(b, ids, keep=1))
    with pytest.raises(UserInputError, match="knows tokens"):
        ours.extend(a, np.array([[1], [10**6]]))
    for step in range(3):
        near(ours.extend(a, ids[:, step : step + 1]), plain.extend(b, ids[:, step : step + 1]))
    ours.vocab_size = None  # as of a file that does not say
    near(ours.extend(a, ids[:, :2]), plain.extend(b, ids[:, :2]))


def test_a_graph_inside_hides_its_readers(tiny, tmp_path):
    model = onnx.load(tiny)
    inner = [
        helper.make_graph(
            [helper.make_node("Shape", ["past_key_values.0.key"], [f"{name}_size"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_size", TensorProto.INT64, [4])],
        )
        for name in ("yes", "no")
    ]
    model.graph.initializer.append(helper.make_tensor("truth", TensorProto.BOOL, [], [True]))
    model.graph.input.append(helper.make_tensor_value_info("truth", TensorProto.BOOL, []))
    branches = dict(zip(("then_branch", "else_branch"), inner, strict=True))
    model.graph.node.append(helper.make_node("If", ["truth"], ["size"], **branches))
    model.graph.output.append(helper.make_tensor_value_info("size", TensorProto.INT64, [4]))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert not open_decoder(path, 1, "cpu")[0].shares


def test_other_sessions_copy(tiny):
    assert not shares_caches(runtime.session(tiny, threads=1))
    assert not shares_caches(decoding_session(tiny, 1, "cpu", kernels=False))
    assert not shares_caches(decoding_session(tiny, 1, "cpu", kernels={"fuse": "products"}))
    assert not shares_caches(decoding_session(tiny, 1, "cpu", kernels={"cache": "copied"}))
    assert shares_caches(decoding_session(tiny, 1, "cpu", kernels={"values": "float32"}))


def test_room_that_is_too_little_is_an_error(tiny):
    opened = runtime.session(tiny, threads=1, kernels={"cache": "shared"})
    feeds = {
        "input_ids": np.array([[1]]),
        "attention_mask": np.ones((1, 9), np.int64),
        "position_ids": np.array([[8]]),
    }
    for value in opened.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], 8, value.shape[3]), np.float32)
    with pytest.raises(Exception, match="than the cache has room for"):
        opened.run(None, feeds)
    with pytest.raises(UserInputError, match="cache is 'mine', wanted one of copied, shared"):
        runtime.session(tiny, kernels={"cache": "mine"})


def test_exported_graphs_do_not_read_the_size_of_their_cache(tiny):
    graph = onnx.load(tiny, load_external_data=False).graph
    readers = {
        node.op_type
        for node in graph.node
        for name in node.input
        if name.startswith("past_key_values.")
    }
    assert readers == {"Attention"}
