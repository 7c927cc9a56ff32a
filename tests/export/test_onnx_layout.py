"""Layout folding, ties, names and half precision on small hand-made graphs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from elsa_compile.errors import UnsupportedModelError, UserInputError
from elsa_compile.onnx_layout import HALVES, store_transposed, weights_to_half
from elsa_compile.onnx_names import merge_tied, resolve_weights, weight_names
from elsa_compile.onnx_save import save
from elsa_compile.sparse_encoding import encode
from elsa_compile.weight_store import StoredWeight, WeightStore
from elsa_compile.write_onnx import write_onnx

RNG = np.random.default_rng(0)
W = RNG.standard_normal((24, 32)).astype(np.float32)
X = RNG.standard_normal((3, 32)).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    made: NodeProto = helper.make_node(op, inputs.split(), [output], **attributes)
    return made


def model_of(nodes: list[NodeProto], output_shape: list[Any], **constants: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    return model


def copy_store(model: onnx.ModelProto) -> WeightStore:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return WeightStore.from_proto(copy)


def run(path: Path, x: Any = X) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def check_same(model: onnx.ModelProto, store: WeightStore, folder: Path, atol: float = 0) -> None:
    onnx.save(model, folder / "before.onnx")
    encode(store, "auto", weight_names(store))
    save(store, folder / "after.onnx")
    onnx.checker.check_model(str(folder / "after.onnx"))
    before, after = run(folder / "before.onnx"), run(folder / "after.onnx")
    np.testing.assert_allclose(after, before, rtol=0, atol=atol)


CHAINS = {
    "transpose": ([node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "y")], (32, 24)),
    "default-perm": ([node("Transpose", "w", "t"), node("MatMul", "x t", "y")], (32, 24)),
    "chain": (
        [
            node("Identity", "w", "i"),
            node("Reshape", "i shape", "r"),
            node("Unsqueeze", "r axis", "u"),
            node("Squeeze", "u axis", "s"),
            node("Transpose", "s", "t"),
            node("MatMul", "x t", "y"),
        ],
        (32, 24),
    ),
    "two-readers": (
        [
            node("Transpose", "w", "t"),
            node("Transpose", "w", "t2"),
            node("MatMul", "x t", "a"),
            node("MatMul", "x t2", "b"),
            node("Add", "a b", "y"),
        ],
        (32, 24),
    ),
    "already": ([node("Gemm", "x w", "y", transB=1)], (24, 32)),
}


@pytest.mark.parametrize("case", CHAINS)
def test_layout_operations_of_a_weight_disappear(case: str, tmp_path: Path) -> None:
    nodes, shape = CHAINS[case]
    model = model_of(nodes, ["n", 24], w=W, shape=np.array([24, 32]), axis=np.array([0], np.int64))
    store = copy_store(model)
    assert store_transposed(store) == []
    assert {n.op_type for n in store.graph.node} <= {"MatMul", "Gemm", "Add"}
    assert {name: w.shape for name, w in store.weights.items()} == {"w": shape}
    check_same(model, store, tmp_path)


def test_a_transpose_is_a_view_and_no_copy() -> None:
    model = model_of(CHAINS["transpose"][0], ["n", 24], w=W)
    store = copy_store(model)
    source = store.weights["w"].array
    store_transposed(store)
    assert np.shares_memory(store.weights["w"].array, source)


def test_different_layouts_keep_the_one_copy(tmp_path: Path) -> None:
    square = RNG.standard_normal((32, 32)).astype(np.float32)
    model = model_of(
        [
            node("Transpose", "w", "t"),
            node("MatMul", "x t", "a"),
            node("MatMul", "a w", "y"),
        ],
        ["n", 32],
        w=square,
    )
    store = copy_store(model)
    (note,) = store_transposed(store)
    assert note == ("w: stays behind a Transpose, it is also read by MatMul; one copy serves both")
    np.testing.assert_array_equal(store.weights["w"].array, square)
    check_same(model, store, tmp_path)


def test_a_weight_that_is_an_output_stays(tmp_path: Path) -> None:
    model = model_of(CHAINS["transpose"][0], ["n", 24], w=W)
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [24, 32]))
    store = copy_store(model)
    assert "input or output of the graph" in store_transposed(store)[0]
    check_same(model, store, tmp_path)


def test_a_reader_inside_a_branch_gets_the_folded_weight(tmp_path: Path) -> None:
    def branch(name: str, source: str) -> Any:
        inner = node("MatMul", f"x {source}", name)
        return helper.make_graph(
            [inner], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )

    model = model_of(
        [
            node("Transpose", "w", "t"),
            node("ReduceSum", "x", "sum", keepdims=0),
            node("Greater", "sum zero", "c"),
            node("If", "c", "y", then_branch=branch("a", "t"), else_branch=branch("b", "t")),
        ],
        ["n", 24],
        w=W,
        zero=np.zeros((), np.float32),
    )
    store = copy_store(model)
    assert store_transposed(store) == []
    assert store.weights["w"].shape == (32, 24)
    assert weights_to_half(store, ["w"], "fp16") == []
    check_same(model, store, tmp_path, atol=2e-2)


def gather_model() -> onnx.ModelProto:
    """Rows of a tied table, multiplied by the table again."""
    return model_of(
        [
            node("Gather", "w rows", "e"),
            node("Transpose", "w", "t"),
            node("MatMul", "x t", "a"),
            node("MatMul", "a e", "y"),
        ],
        ["n", 32],
        w=W,
        rows=np.arange(24)[::-1].copy(),
    )


@pytest.mark.parametrize("kind", HALVES)
def test_halves_cast_the_rows_of_a_table_and_not_the_table(tmp_path: Path, kind: str) -> None:
    store = copy_store(gather_model())
    store_transposed(store)
    weights_to_half(store, ["w"], kind)
    operations = [n.op_type for n in store.graph.node]
    assert operations.count("Cast") == 2
    gather = next(n for n in store.graph.node if n.op_type == "Gather")
    assert gather.input[0] == "w"
    cast = next(n for n in store.graph.node if n.input[0] == gather.output[0])
    assert cast.op_type == "Cast"
    rounded = gather_model()
    rounded.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(W.astype(HALVES[kind]).astype(np.float32), "w")
    )
    check_same(rounded, store, tmp_path, atol=1e-5)
    assert store.storage["w"].dtype == HALVES[kind].name


@pytest.mark.parametrize(
    ("kind", "value"),
    [("fp16", 65520.0), ("fp16", -1e9), ("fp16", np.inf), ("bf16", np.nan), ("bf16", 3.4e38)],
)
def test_what_a_half_cannot_hold_is_an_error(kind: str, value: float) -> None:
    array = W.copy()
    array[5, 6] = value
    store = copy_store(model_of(CHAINS["already"][0], ["n", 24], w=array))
    said = f"--dtype {kind}: the weight w holds the value .*fp32"
    with pytest.raises(UserInputError, match=said):
        weights_to_half(store, ["w"], kind)


@pytest.mark.parametrize(
    ("kind", "below", "largest"),
    [("fp16", np.float32(65520), 65504), ("bf16", np.float32(2**128 - 2**119), 2**128 - 2**120)],
)
def test_halves_round_to_their_largest_value_just_below_the_limit(
    tmp_path: Path, kind: str, below: np.float32, largest: float
) -> None:
    array = W.copy()
    array[5, 6] = np.nextafter(below, np.float32(0))
    store = copy_store(model_of(CHAINS["already"][0], ["n", 24], w=array))
    assert weights_to_half(store, ["w"], kind) == []
    encode(store, "auto", ["w"])
    save(store, tmp_path / "m.onnx")
    (tensor,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert float(numpy_helper.to_array(tensor).astype(np.float64)[5, 6]) == largest


def tied_store() -> WeightStore:
    """Two initializers over one memory, as a tied head and embedding come from torch."""
    model = model_of(
        [
            node("Gather", "embed rows", "e"),
            node("Transpose", "head", "t"),
            node("MatMul", "x t", "a"),
            node("MatMul", "a e", "y"),
        ],
        ["n", 32],
        rows=np.arange(24),
    )
    store = WeightStore.from_proto(model)
    for name in ("embed", "head"):
        store.weights[name] = StoredWeight(W, W.dtype)
    return store


@pytest.mark.parametrize(
    ("expected", "stored"),
    [
        (["head"], "embed"),
        (["embed", "head"], "embed"),
        ({"wte": ["head", "embed"]}, "wte"),
        ({"head": []}, "head"),
    ],
)
def test_tied_weights_are_stored_once_under_the_expected_name(
    expected: Any, stored: str, tmp_path: Path
) -> None:
    store = tied_store()
    assert merge_tied(store) == {"head": "embed"}
    assert resolve_weights(store, expected, {"head": "embed"}) == [stored]
    assert store.weights.keys() == {"rows", stored}
    assert "one copy serves both" in store_transposed(store)[0]
    encode(store, "auto", [stored])
    save(store, tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx"), X @ W.T @ W, rtol=1e-5, atol=1e-4)


def test_equal_values_in_different_memory_stay_apart() -> None:
    store = tied_store()
    store.weights["head"] = StoredWeight(W.copy(), W.dtype)
    assert merge_tied(store) == {}


def test_a_name_that_is_taken_is_an_error() -> None:
    store = tied_store()
    with pytest.raises(UnsupportedModelError, match="embed cannot be stored as x, which is"):
        resolve_weights(store, {"x": ["embed"]}, {})


def test_weights_are_told_from_tables_masks_and_norms() -> None:
    model = model_of(
        [
            node("Cast", "w", "c", to=TensorProto.FLOAT),
            node("Transpose", "c", "t"),
            node("MatMul", "x t", "a"),
            node("Add", "a mask", "b"),
            node("Mul", "b norm", "y"),
        ],
        ["n", 24],
        w=W.astype(np.float16),
        mask=np.zeros((1, 24), np.float32),
        norm=np.ones(24, np.float32),
    )
    assert weight_names(copy_store(model)) == ["w"]


def test_reshapes_to_different_shapes_keep_the_weight_as_it_is(tmp_path: Path) -> None:
    model = model_of(
        [
            node("Reshape", "w first", "a"),
            node("Reshape", "w second", "b"),
            node("MatMul", "x a", "c"),
            node("MatMul", "c b", "y"),
        ],
        ["n", 32],
        w=W,
        first=np.array([32, 24]),
        second=np.array([24, 32]),
    )
    store = copy_store(model)
    store_transposed(store)
    assert store.weights["w"].shape == (24, 32)
    assert [n.op_type for n in store.graph.node].count("Reshape") == 2
    check_same(model, store, tmp_path)


def test_a_transpose_inside_a_branch_keeps_the_weight_as_it_is(tmp_path: Path) -> None:
    """Folding the outer one alone would transpose the branch's weight twice."""

    def branch(name: str) -> Any:
        inner = [node("Transpose", "w", f"{name}.t"), node("MatMul", f"x {name}.t", name)]
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph(inner, name, [], [value])

    model = model_of(
        [
            node("Transpose", "w", "t"),
            node("MatMul", "x t", "outer"),
            node("ReduceSum", "x", "sum", keepdims=0),
            node("Greater", "sum zero", "c"),
            node("If", "c", "inner", then_branch=branch("a"), else_branch=branch("b")),
            node("Add", "outer inner", "y"),
        ],
        ["n", 24],
        w=W,
        zero=np.zeros((), np.float32),
    )
    store = copy_store(model)
    assert len(store_transposed(store)) == 1
    assert store.weights["w"].shape == (24, 32)
    check_same(model, store, tmp_path)


def test_a_renamed_weight_keeps_its_recorded_shape() -> None:
    model = model_of(CHAINS["already"][0], ["n", 24], w=W)
    model.graph.value_info.append(helper.make_tensor_value_info("w", 1, [24, 32]))
    store = copy_store(model)
    assert resolve_weights(store, {"fc.weight": ["w"]}, {}) == ["fc.weight"]
    assert [value.name for value in store.graph.value_info] == ["fc.weight"]
    assert list(store.graph.node[0].input) == ["x", "fc.weight"]


def test_a_tie_of_a_whole_model_is_stored_once(tmp_path: Path) -> None:
    model = model_of(
        [
            node("Gather", "embed rows", "e"),
            node("Transpose", "head", "t"),
            node("MatMul", "x t", "a"),
            node("MatMul", "a e", "y"),
        ],
        ["n", 32],
        rows=np.arange(24),
        embed=W,
        head=W,
    )
    exported = ir.from_proto(model)
    shared = W.copy()
    for name in ("embed", "head"):
        exported.graph.initializers[name].const_value = ir.tensor(shared, name=name)
    result = write_onnx(exported, tmp_path / "m.onnx", expected_weights={"wte": ["head"]})
    assert [r.name for r in result.records] == ["rows", "wte"]
    np.testing.assert_allclose(run(tmp_path / "m.onnx"), X @ W.T @ W, rtol=1e-5, atol=1e-4)


def test_metadata_replaces_its_own_keys_and_keeps_others(tmp_path: Path) -> None:
    model = model_of(CHAINS["already"][0], ["n", 24], w=W)
    helper.set_model_props(model, {"elsa.recipe": "old", "author": "somebody"})
    write_onnx(ir.from_proto(model), tmp_path / "m.onnx", metadata={"elsa.recipe": "new"})
    entries = [(e.key, e.value) for e in onnx.load(tmp_path / "m.onnx").metadata_props]
    assert sorted(entries) == [("author", "somebody"), ("elsa.recipe", "new")]
