"""Attention in our kernels: the same as float64 says, caches too, and what is not ours stays."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile import runtime
from elsa_compile.runtime import kernels, provider, reference
from elsa_compile.runtime.layers import profile
from elsa_compile.runtime.onnx_file import inspect
from tests.runtime.test_provider import ISAS

WITH_ATTENTION = ISAS[1:]
pytestmark = pytest.mark.skipif(
    kernels.available()[0] and kernels.isa() == "portable",
    reason="only kernels with vectors do attention",
)


class Case:
    """One Attention node, its model, inputs and what float64 makes of them."""

    def __init__(
        self, heads, groups, width, mask=None, causal=False, rotary=0, flat=True, past=True,
        scale=None, value_width=None, keep=True, softcap=0.0, constant_mask=None, more_keys=0,
    ):  # fmt: skip
        self.heads, self.groups, self.width = heads, groups, width
        self.mask, self.causal, self.rotary, self.flat, self.past = mask, causal, rotary, flat, past
        self.scale, self.value_width, self.keep = scale, value_width or width, keep
        self.softcap, self.constant_mask = softcap, constant_mask
        self.more_keys = more_keys  # than queries

    def _heads(self, name, count, width, length="s"):
        shape = ["b", length, count * width] if self.flat else ["b", count, length, width]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def save(self, folder):
        heads, groups, width, values = self.heads, self.groups, self.width, self.value_width
        inputs = [
            self._heads("q", heads, width),
            self._heads("k", groups, width, "n" if self.more_keys else "s"),
            self._heads("v", groups, values, "n" if self.more_keys else "s"),
        ]
        nodes, q, k = [], "q", "k"
        if self.rotary:
            for name in ("cos", "sin"):
                shape = ["b", "s", self.rotary // 2]
                inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            for name, count in (("q", heads), ("k", groups)):
                given = {"num_heads": count} if self.flat else {}
                if self.rotary != width:
                    given["rotary_embedding_dim"] = self.rotary
                turned = helper.make_node(
                    "RotaryEmbedding", [name, "cos", "sin"], [f"{name}t"], name=f"{name}t", **given
                )
                nodes.append(turned)
            q, k = "qt", "kt"
        mask, initializers = "", []
        if self.mask:
            mask, kind = "mask", TensorProto.BOOL if self.mask[0] == "bool" else TensorProto.FLOAT
            inputs.append(helper.make_tensor_value_info("mask", kind, list(self.mask[1])))
        if self.constant_mask is not None:
            mask = "fixed"
            initializers.append(numpy_helper.from_array(self.constant_mask, "fixed"))
        names = [q, k, "v", mask]
        outputs = [self._heads("y", heads, values)]
        results = ["y"]
        kept = (("keys", width), ("values", values))
        if self.past:
            for name, size in kept:
                shape = ["b", groups, "p", size]
                inputs.append(
                    helper.make_tensor_value_info(f"past_{name}", TensorProto.FLOAT, shape)
                )
                names.append(f"past_{name}")
        if self.keep:
            for name, size in kept:
                shape = ["b", groups, "t", size]
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
                results.append(name)
        given = {"is_causal": int(self.causal)}
        if self.flat:
            given |= {"q_num_heads": heads, "kv_num_heads": groups}
        if self.scale:
            given["scale"] = self.scale
        if self.softcap:
            given["softcap"] = self.softcap
        nodes.append(helper.make_node("Attention", names, results, name="attention", **given))
        graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        path = folder / "model.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path

    def feeds(self, batch, queries, past, seed=0):
        random = np.random.default_rng(seed)
        normal = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
        sizes = {"q": (self.heads, self.width), "k": (self.groups, self.width),
                 "v": (self.groups, self.value_width)}  # fmt: skip
        feeds = {}
        for name, (count, size) in sizes.items():
            length = queries + (self.more_keys if name != "q" else 0)
            shape = (length, count * size) if self.flat else (count, length, size)
            feeds[name] = normal(batch, *shape)
        if self.rotary:
            angles = normal(batch, queries, self.rotary // 2)
            feeds |= {"cos": np.cos(angles), "sin": np.sin(angles)}
        if self.past:
            feeds["past_keys"] = normal(batch, self.groups, past, self.width)
            feeds["past_values"] = normal(batch, self.groups, past, self.value_width)
        total = queries + self.more_keys + (past if self.past else 0)
        if self.mask:
            known = {"b": batch, "h": self.heads, "s": queries, "t": total}
            shape = [known.get(axis, axis) for axis in self.mask[1]]
            feeds["mask"] = self._mask(random, shape, total)
        return feeds

    def _mask(self, random, shape, total):
        if self.mask[0] == "float":
            added = random.standard_normal(shape).astype(np.float32)
            if self.mask[2:]:  # what hides a key, so that one and the other come together
                added[random.random(shape) < 0.4] = self.mask[2]
                added[..., 0] = 0.5
            return added
        if self.mask[2] == "random":
            mask = random.random(shape) < 0.7
            mask[..., 0] = True
            return mask
        # As a decoder's: up to each query's own place, and the first ones of an entry are padding.
        mask = np.ones(shape, bool)
        if shape[-2] > 1:
            mask &= np.arange(shape[-1]) <= np.arange(total - shape[-2], total)[:, None]
        if shape[0] > 1:
            mask[1, ..., : min(3, total - 1)] = False
        return mask

    def wanted(self, feeds):
        apart = lambda x, n: x if not self.flat else x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)  # noqa: E731
        q = apart(feeds["q"], self.heads)
        k, v = apart(feeds["k"], self.groups), apart(feeds["v"], self.groups)
        if self.rotary:
            q, k = (reference.rotate(x, feeds["cos"], feeds["sin"]) for x in (q, k))
        if self.past:
            k = np.concatenate([feeds["past_keys"], k], axis=2)
            v = np.concatenate([feeds["past_values"], v], axis=2)
        scale = self.scale or self.width**-0.5
        mask = feeds.get("mask", self.constant_mask)
        past = feeds["past_keys"].shape[2] if self.past else 0
        y = reference.attention(q, k, v, scale, mask, past if self.causal else None)
        if self.flat:
            y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
        return [y, k, v] if self.keep else [y]


def operators_of_ours(path, options=None):
    """The operators in each of our nodes."""
    import onnxruntime

    session = onnxruntime.SessionOptions()
    session.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session.add_provider_for_devices(provider.devices(onnxruntime), options or {})
    opened = onnxruntime.InferenceSession(str(path), session)
    if not hasattr(opened, "get_provider_graph_assignment_info"):
        pytest.skip("onnxruntime 1.23 does not tell what is in a node")
    parts = opened.get_provider_graph_assignment_info()
    mine = [part for part in parts if part.ep_name == provider.NAME]
    return [sorted(node.op_type for node in part.get_nodes()) for part in mine]


def check(case, path, sizes, threads=1):
    opened = runtime.session(path, threads=threads)
    for batch, queries, past in sizes:
        feeds = case.feeds(batch, queries, past)
        for found, wanted in zip(opened.run(None, feeds), case.wanted(feeds), strict=True):
            assert found.shape == wanted.shape
            largest = np.abs(wanted).max() if wanted.size else 1.0
            assert np.abs(found - wanted).max(initial=0.0) <= 3e-6 * largest, (batch, queries, past)


DECODER = ("bool", ("b", 1, "s", "t"), "decoder")
CASES = {
    "decoder": Case(9, 3, 64, DECODER, rotary=64),
    "decoder-apart": Case(9, 3, 64, DECODER, rotary=64, flat=False),
    "part-turned": Case(4, 2, 80, DECODER, rotary=32),
    "one-head-of-keys": Case(8, 1, 128, DECODER),
    "random-mask": Case(4, 4, 32, ("bool", ("b", 1, "s", "t"), "random"), flat=False),
    "mask-of-heads": Case(4, 2, 16, ("bool", ("b", "h", "s", "t"), "random")),
    "mask-for-all": Case(4, 2, 48, ("bool", ("s", "t"), "random")),
    "mask-of-keys": Case(4, 2, 48, ("bool", ("b", 1, 1, "t"), "random")),
    "mask-of-queries": Case(4, 2, 48, ("float", (1, 1, "s", 1))),
    "added": Case(6, 2, 64, ("float", ("b", 1, "s", "t"))),
    "added-by-heads": Case(6, 3, 32, ("float", (1, "h", "s", "t")), flat=False),
    "added-least": Case(6, 2, 64, ("float", ("b", 1, "s", "t"), np.finfo(np.float32).min)),
    "added-infinity": Case(6, 2, 64, ("float", ("b", 1, "s", "t"), -np.inf)),
    "added-1e4": Case(6, 2, 64, ("float", ("b", 1, "s", "t"), -1e4)),
    "added-1e20": Case(6, 2, 64, ("float", ("b", 1, "s", "t"), -1e20)),
    "added-1e37": Case(6, 2, 64, ("float", ("b", 1, "s", "t"), -1e37)),
    "more-keys": Case(4, 2, 64, ("bool", ("b", 1, "s", "t"), "random"), more_keys=5),
    "more-keys-causal": Case(4, 2, 64, causal=True, more_keys=70, past=False),
    "causal": Case(4, 2, 64, causal=True, scale=0.3),
    "causal-and-mask": Case(4, 2, 64, ("bool", ("b", 1, "s", "t"), "random"), causal=True),
    "encoder": Case(12, 12, 64, past=False, keep=False),
    "narrow-values": Case(4, 2, 96, DECODER, value_width=32),
}
SIZES = [(1, 1, 0), (1, 1, 1), (1, 1, 7), (2, 1, 130), (1, 3, 65), (2, 5, 5), (1, 9, 62),
         (1, 20, 0), (2, 70, 3), (1, 130, 40), (1, 1, 1100), (1, 2, 520)]  # fmt: skip


@pytest.mark.parametrize("isa", WITH_ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_float64_says(tmp_path, monkeypatch, name, isa):
    monkeypatch.delenv(kernels.ISA_ENVIRONMENT, raising=False)
    if isa not in ISAS[: ISAS.index(kernels.isa()) + 1]:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, isa)
    case = CASES[name]
    path = case.save(tmp_path)
    check(case, path, SIZES)
    check(case, path, [(2, 1, 700), (1, 150, 10)], threads=3)
    ours = operators_of_ours(path)
    assert ours == [["Attention", *["RotaryEmbedding"] * (2 if case.rotary else 0)]]


@pytest.mark.parametrize("read", [["y"], ["keys"], ["values"], ["y", "values"], ["keys", "values"]])
def test_outputs_that_nobody_reads(tmp_path, read):
    case = CASES["decoder"]
    path = case.save(tmp_path)
    model = onnx.load(path)
    kept = [value for value in model.graph.output if value.name in read]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, path)
    feeds = case.feeds(1, 3, 70)
    wanted = dict(zip(["y", "keys", "values"], case.wanted(feeds), strict=True))
    opened = runtime.session(path)
    for name, found in zip(read, opened.run(read, feeds), strict=True):
        assert np.abs(found - wanted[name]).max() <= 3e-6 * np.abs(wanted[name]).max()


def test_no_tokens_and_no_batch(tmp_path):
    case = Case(4, 2, 32, ("bool", ("b", 1, "s", "t"), "random"))
    opened = runtime.session(case.save(tmp_path))
    for batch, queries, past in ((0, 1, 3), (2, 0, 5)):
        feeds = case.feeds(batch, queries, past)
        for found, shape in zip(
            opened.run(None, feeds),
            [(batch, queries, 128), (batch, 2, queries + past, 32), (batch, 2, queries + past, 32)],
            strict=True,
        ):
            assert found.shape == shape
        kept = opened.run(None, feeds)[1]
        assert np.array_equal(kept[:, :, :past], feeds["past_keys"])


def test_a_query_that_sees_nothing_gets_zeros(tmp_path):
    for kind in ("bool", "float"):
        how = ("random",) if kind == "bool" else ()
        case = Case(4, 2, 32, (kind, ("b", 1, "s", "t"), *how))
        opened = runtime.session(case.save(tmp_path))
        for queries in (2, 40):
            feeds = case.feeds(1, queries, 9)
            nothing = False if kind == "bool" else np.finfo(np.float32).min
            feeds["mask"][:, :, 1] = nothing
            found = opened.run(None, feeds)[0]
            assert np.all(found[:, 1] == 0)
            assert np.all(found[:, 0] != 0)


def test_a_cache_that_leaves_the_processors_own_is_copied_all_the_same(tmp_path):
    case = Case(8, 8, 128, DECODER)  # 2 x 33 MB and as much again for the result
    check(case, case.save(tmp_path), [(1, 1, 4000)], threads=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, 8, DECODER),
        Case(4, 2, 32, DECODER, softcap=5.0),
        Case(4, 2, 32, past=False, constant_mask=np.tril(np.ones((6, 6), bool))),
    ],
    ids=["narrow", "softcap", "constant-mask"],
)
def test_what_is_not_ours_stays_with_onnxruntime(tmp_path, case):
    path = case.save(tmp_path)
    assert operators_of_ours(path) == []
    feeds = case.feeds(1, 6, 9)
    found = runtime.session(path).run(None, feeds)
    plain = runtime.session(path, kernels=False).run(None, feeds)
    assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))


def test_fuse_products_leaves_attention_alone(tmp_path):
    path = CASES["decoder"].save(tmp_path)
    assert operators_of_ours(path, {"fuse": "products"}) == []


def test_turned_heads_that_others_read_stay_outside(tmp_path):
    case = CASES["decoder"]
    path = case.save(tmp_path)
    model = onnx.load(path)
    model.graph.output.append(
        helper.make_tensor_value_info("kt", TensorProto.FLOAT, ["b", "s", 192])
    )
    onnx.save(model, path)
    assert operators_of_ours(path) == [["Attention", "RotaryEmbedding"]]
    feeds = case.feeds(1, 3, 4)
    *found, turned = runtime.session(path).run(None, feeds)
    for one, other in zip(found, case.wanted(feeds), strict=True):
        assert np.abs(one - other).max() <= 3e-6 * np.abs(other).max()
    apart = turned.reshape(1, 3, 3, 64).swapaxes(1, 2)
    assert np.allclose(apart, found[1][:, :, 4:], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cos", (1, 2, 32), "angles that do not fit"),
        ("mask", (1, 1, 3, 9), "a mask whose sizes do not fit"),
        ("past_values", (1, 3, 5, 64), "a cache whose sizes do not fit"),
        ("v", (1, 2, 192), "different batches or lengths"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(tmp_path, name, shape, message):
    case = CASES["decoder"]
    opened = runtime.session(case.save(tmp_path))
    feeds = case.feeds(1, 3, 4)
    feeds[name] = np.ones(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=message):
        opened.run(None, feeds)


def test_the_table_of_layers_names_it(tmp_path):
    path = Case(4, 2, 32, past=False, keep=False).save(tmp_path)
    if not operators_of_ours(path):
        pytest.fail("attention is not taken")
    opened = runtime.session(path)
    (rows,) = profile(opened, inspect(path), [], []).values()
    named = {row["node"]: row for row in rows}
    assert named["attention"]["op"] == "Attention"
    assert named["attention"]["kernel"] == "ours"
    assert named["attention"]["weight_bytes"] == 0
