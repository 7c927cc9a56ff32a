"""The packed form: round trips, a reader written from docs/packed-format.md, malformed files."""

import contextlib
import math

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile import runtime
from elsa_compile.runtime import bitmask, kernels
from elsa_compile.runtime.cli import main
from elsa_compile.runtime.errors import ElsaError, UserInputError
from elsa_compile.runtime.onnx_file import inspect
from elsa_compile.runtime.pack_file import pack_file
from elsa_compile.runtime.stock import write_stock
from elsa_compile.runtime.unpack_file import unpack_file
from elsa_compile.runtime.unpack_function import VARIANTS, function

RNG = np.random.default_rng(0)
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NAN = np.array([0x7FC12345], np.uint32).view(np.float32)[0]  # a payload of its own


def sparse(shape, sparsity, dtype=np.float32):
    values = RNG.standard_normal(shape) * 40 + 100
    return np.where(RNG.random(shape) < sparsity, 0, values).astype(dtype)


def saved(path, nodes, weights, inputs, outputs, opset=21, **tensors):
    made = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [*made, *tensors.get("raw", [])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def a_matmul(path, weight, opset=21):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    inputs, outputs = [value("x", ["m", weight.shape[0]])], [value("y", ["m", weight.shape[1]])]
    return saved(path, nodes, {"w": weight}, inputs, outputs, opset)


def a_tied_model(path, table):
    """A table that is looked up and multiplied with, as a tied head is."""
    rows, columns = table.shape
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"], name="head"),
    ]
    inputs = [value("ids", ["m"], TensorProto.INT64)]
    return saved(path, nodes, {"table": table}, inputs, [value("y", ["m", rows])])


def run(path, **feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def read_by_document(path):
    """Every packed weight of a file, by docs/packed-format.md alone."""
    model = onnx.load(path)
    assert {e.domain: e.version for e in model.opset_import}["elsa"] == 1
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.domain != "elsa":
            continue
        mask_name, values_name = node.input
        shape = list(node.attribute[0].ints)
        entries = math.prod(shape)
        mask = numpy_helper.to_array(tensors[mask_name])
        values = tensors[values_name]
        raw = np.frombuffer(values.raw_data, np.uint8)
        if "Int4" in node.op_type:
            raw = np.array([[byte & 15, byte >> 4] for byte in raw], np.uint8).reshape(-1)
        else:
            raw = raw.reshape(values.dims[0], -1)  # the bytes of each value
        weight = np.empty((entries, *raw.shape[1:]), np.uint8)
        place = 0
        for entry in range(entries):
            bit = mask[entry // 8] >> (entry % 8) & 1
            place += int(bit)
            weight[entry] = raw[place] if bit else raw[0]
        weight = weight.reshape(*shape, *raw.shape[1:])
        if node.op_type.endswith("Transposed"):
            weight = weight.swapaxes(0, 1)
        found[node.output[0]] = weight
    return found


def bytes_of(array):
    array = np.ascontiguousarray(array)
    return array.view(np.uint8).reshape(*array.shape, array.dtype.itemsize)


SHAPES = [(1, 300), (16, 24), (33, 17), (7, 129), (64, 64), (3, 5, 41), (5, 3, 3, 7), (513,)]
TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint8]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_a_weight_keeps_every_bit(shape, dtype, sparsity):
    dense = sparse(shape, sparsity, dtype)
    if np.dtype(dtype).kind not in "iu":
        dense.reshape(-1)[:2] = -0.0, NAN
    mask, values = bitmask.encode(dense)
    kept = bitmask.check(mask, values, len(values), shape, "w")
    assert mask.nbytes + values.nbytes == bitmask.packed_nbytes(
        dense.size, kept, 8 * dense.dtype.itemsize
    )
    assert (bytes_of(bitmask.decode(mask, values, shape)) == bytes_of(dense)).all()
    if dense.ndim == 2:  # a view with other strides packs as what it shows
        other = bitmask.encode(np.ascontiguousarray(dense.T).T)
        assert (other[0] == mask).all()
        assert (bytes_of(other[1]) == bytes_of(values)).all()


def test_blocks_of_large_weights_join(monkeypatch):
    monkeypatch.setattr(bitmask, "_BLOCK", 64)
    for dense in (sparse((37, 19), 0.6), sparse((40, 23), 0.6).T):
        mask, values = bitmask.encode(dense)
        assert bitmask.check(mask, values, len(values), dense.shape, "w") == (dense != 0).sum()
        assert (bitmask.decode(mask, values, dense.shape) == dense).all()


def test_negative_zeros_are_values_unless_dropped():
    dense = np.array([0.0, -0.0, 1.0, -0.0], np.float32)
    assert len(bitmask.encode(dense)[1]) == 4
    assert len(bitmask.encode(dense, drop_negative_zeros=True)[1]) == 2


@pytest.mark.parametrize("shape", [(64, 48), (37, 51), (8, 129)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_file_round_trips_and_stock_onnxruntime_runs_it(tmp_path, shape, dtype):
    weight = sparse(shape, 0.8)
    weight[3] = 0  # an empty row
    weight[0, :2] = -0.0, 1.5
    cast = helper.make_node("Cast", ["h"], ["w"], to=1)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    held = weight.astype(dtype)
    nodes = [product] if dtype == np.float32 else [cast, product]
    name = "w" if dtype == np.float32 else "h"
    dense = saved(
        tmp_path / "dense.onnx", nodes, {name: held}, [value("x", ["m", shape[0]])],
        [value("y", ["m", shape[1]])],
    )  # fmt: skip
    result = pack_file(dense, tmp_path / "packed.onnx")
    assert [w["form"] for w in result["weights"]] == ["packed"]
    onnx.checker.check_model(str(tmp_path / "packed.onnx"), full_check=True)
    x = RNG.standard_normal((5, shape[0])).astype(np.float32)
    assert (run(dense, x=x) == run(tmp_path / "packed.onnx", x=x)).all()
    ((_, read),) = read_by_document(tmp_path / "packed.onnx").items()
    assert (read == bytes_of(held)).all()
    for form in ("dense", "coo"):
        back = tmp_path / f"{form}.onnx"
        unpack_file(tmp_path / "packed.onnx", back, form=form)
        assert [(w.name, w.form, w.shape) for w in inspect(back).weights] == [(name, form, shape)]
        assert (run(back, x=x) == run(dense, x=x)).all()
    (tensor,) = onnx.load(tmp_path / "dense.onnx").graph.initializer
    assert tensor.raw_data == held.tobytes()


def test_sparse_initializers_are_packed_as_what_they_mean(tmp_path):
    weight = sparse((128, 96), 0.8)
    path = a_matmul(tmp_path / "dense.onnx", weight)
    pack_file(path, tmp_path / "packed.onnx")
    unpack_file(tmp_path / "packed.onnx", tmp_path / "coo.onnx", form="coo")
    assert inspect(tmp_path / "coo.onnx").weights[0].form == "coo"
    pack_file(tmp_path / "coo.onnx", tmp_path / "again.onnx")
    first, again = (read_by_document(tmp_path / n)["w"] for n in ("packed.onnx", "again.onnx"))
    assert (first == again).all()


def test_a_tied_table_is_stored_once_and_unpacked_for_each_reader(tmp_path):
    table = sparse((96, 40), 0.85)
    path = a_tied_model(tmp_path / "dense.onnx", table)
    pack_file(path, tmp_path / "packed.onnx")
    nodes = onnx.load(tmp_path / "packed.onnx").graph.node
    assert [n.op_type for n in nodes] == ["Unpack", "UnpackTransposed", "Gather", "MatMul"]
    assert [w.name for w in inspect(tmp_path / "packed.onnx").weights] == ["table"]
    ids = np.array([0, 95, 3])
    assert (run(path, ids=ids) == run(tmp_path / "packed.onnx", ids=ids)).all()
    unpack_file(tmp_path / "packed.onnx", tmp_path / "back.onnx")
    assert (run(path, ids=ids) == run(tmp_path / "back.onnx", ids=ids)).all()
    (tensor,) = onnx.load(tmp_path / "back.onnx").graph.initializer
    assert tensor.name == "table"
    assert tensor.raw_data == table.tobytes()


def quantised_model(path, whole, scale, zero, **attributes):
    names = ["w", "scale", "zero"][: 3 if zero is not None else 2]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["d"], **attributes),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    weights = {"scale": scale} | ({} if zero is None else {"zero": zero})
    raw = [whole] if isinstance(whole, TensorProto) else []
    weights |= {} if raw else {"w": whole}
    rows, columns = whole.dims if raw else whole.shape
    return saved(path, nodes, weights, [value("x", ["m", rows])], [value("y", ["m", columns])],
                 raw=raw)  # fmt: skip


def test_a_zero_point_is_the_fill_value(tmp_path):
    whole = np.where(RNG.random((64, 48)) < 0.8, 131, RNG.integers(0, 255, (64, 48)))
    scale = np.full(48, 0.02, np.float32)
    path = quantised_model(
        tmp_path / "d.onnx", whole.astype(np.uint8), scale, np.full(48, 131, np.uint8), axis=1
    )
    pack_file(path, tmp_path / "p.onnx")
    tensors = {t.name: t for t in onnx.load(tmp_path / "p.onnx").graph.initializer}
    assert tensors["w.values"].raw_data[0] == 131
    assert tensors["w.values"].dims[0] == 1 + (whole != 131).sum()
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    assert np.allclose(run(path, x=x), run(tmp_path / "p.onnx", x=x), rtol=1e-6)


def test_int4_round_trips_and_runs(tmp_path):
    rows, columns = 64, 96
    whole = sparse((rows, columns), 0.8, np.int8) % 8
    whole[RNG.random(whole.shape) < 0.05] = -7
    flat = whole.reshape(-1).view(np.uint8) & 15
    tensor = TensorProto(name="w", data_type=TensorProto.INT4, dims=[rows, columns])
    tensor.raw_data = (flat[::2] | flat[1::2] << 4).tobytes()
    scale = RNG.random((rows // 16, columns)).astype(np.float32)
    path = quantised_model(tmp_path / "d.onnx", tensor, scale, None, axis=0, block_size=16)
    result = pack_file(path, tmp_path / "p.onnx")
    assert {w["name"]: w["form"] for w in result["weights"]} == {"w": "packed", "scale": "dense"}
    assert (read_by_document(tmp_path / "p.onnx")["w"] == flat.reshape(rows, columns)).all()
    unpack_file(tmp_path / "p.onnx", tmp_path / "back.onnx")
    tensors = {t.name: t for t in onnx.load(tmp_path / "back.onnx").graph.initializer}
    assert tensors["w"].raw_data == tensor.raw_data
    x = RNG.standard_normal((2, rows)).astype(np.float32)
    assert (run(path, x=x) == run(tmp_path / "p.onnx", x=x)).all()


def test_bytes_are_near_the_formula(tmp_path):
    for sparsity, most in ((0.5, 0.66), (0.7, 0.45), (0.8, 0.35), (0.9, 0.25)):
        whole = sparse((512, 512), 0.0, np.int8)
        whole[whole == 0] = 1
        whole.reshape(-1)[RNG.permutation(whole.size)[: int(sparsity * whole.size)]] = 0
        path = quantised_model(tmp_path / "d.onnx", whole, np.ones(512, np.float32), None, axis=1)
        (packed,) = (
            w for w in pack_file(path, tmp_path / "p.onnx")["weights"] if w["form"] == "packed"
        )
        formula = bitmask.packed_nbytes(whole.size, packed["nonzeros"], 8)
        assert packed["after_bytes"] <= 1.05 * formula
        assert packed["after_bytes"] <= most * packed["dense_bytes"]


def test_external_data_are_written_and_read(tmp_path):
    weight = sparse((64, 48), 0.8)
    path = a_matmul(tmp_path / "dense.onnx", weight)
    result = pack_file(path, tmp_path / "packed.onnx", external=True)
    # The small mask stays inside; what has 1 kB and more goes beside.
    assert result["data_bytes"] > 1000
    (data,) = tmp_path.glob("packed.onnx.*.data")
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    assert (run(path, x=x) == run(tmp_path / "packed.onnx", x=x)).all()
    back = unpack_file(tmp_path / "packed.onnx", tmp_path / "back.onnx", external=True)
    assert back["data_bytes"] >= weight.nbytes
    assert (run(path, x=x) == run(tmp_path / "back.onnx", x=x)).all()
    pack_file(path, tmp_path / "packed.onnx")
    assert not data.exists()


def test_large_models_go_to_external_data_weight_by_weight(tmp_path, monkeypatch):
    path = a_matmul(tmp_path / "dense.onnx", sparse((64, 48), 0.8))
    for module in ("pack_file", "unpack_file"):
        limit = f"elsa_compile.runtime.{module}.IN_FILE_LIMIT_BYTES"
        monkeypatch.setattr(limit, 10_000)
    assert pack_file(path, tmp_path / "packed.onnx")["data_bytes"] > 1000
    assert unpack_file(tmp_path / "packed.onnx", tmp_path / "back.onnx")["data_bytes"] > 10_000
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    assert (run(path, x=x) == run(tmp_path / "back.onnx", x=x)).all()


def test_stock_versions_are_made_of_packed_files(tmp_path):
    path = a_matmul(tmp_path / "dense.onnx", sparse((64, 48), 0.8))
    pack_file(path, tmp_path / "packed.onnx")
    (tmp_path / "stock").mkdir()
    (tmp_path / "same").mkdir()
    made = write_stock(inspect(tmp_path / "packed.onnx"), 8, tmp_path / "stock")
    same = write_stock(inspect(path), 8, tmp_path / "same")
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    assert (run(made.path, x=x) == run(same.path, x=x)).all()


def test_nothing_is_left_of_a_failure(tmp_path):
    weight = sparse((64, 48), 0.0)
    path = a_matmul(tmp_path / "dense.onnx", weight)
    with pytest.raises(UserInputError, match="no weight gets smaller"):
        pack_file(path, tmp_path / "packed.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.onnx"]
    with pytest.raises(UserInputError, match="no packed weights"):
        unpack_file(path, tmp_path / "back.onnx")
    with pytest.raises(UserInputError, match="no folder"):
        pack_file(a_matmul(path, sparse((64, 48), 0.9)), tmp_path / "nowhere" / "p.onnx")


def test_older_operator_sets_are_refused(tmp_path):
    path = a_matmul(tmp_path / "old.onnx", sparse((64, 48), 0.9), opset=11)
    with pytest.raises(UserInputError, match="operator set 11"):
        pack_file(path, tmp_path / "p.onnx")
    # 13 is enough.
    pack_file(a_matmul(path, sparse((64, 48), 0.9), opset=13), tmp_path / "p.onnx")
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    assert (run(path, x=x) == run(tmp_path / "p.onnx", x=x)).all()


def test_a_machine_too_small_to_decode_is_said_before_it_swaps(tmp_path, monkeypatch):
    pack_file(a_matmul(tmp_path / "dense.onnx", sparse((64, 48), 0.8)), tmp_path / "p.onnx")
    limit = "elsa_compile.runtime.session.memory_limit_bytes"
    monkeypatch.setattr(limit, lambda: 64 * 48 * 10)
    with pytest.raises(UserInputError, match="needs about 89088 bytes to decode"):
        runtime.session(tmp_path / "p.onnx", provider="cpu", kernels=False)
    if kernels.available()[0]:  # which decode nothing
        runtime.session(tmp_path / "p.onnx", provider="cpu", kernels=True)
    runtime.session(tmp_path / "dense.onnx", provider="cpu", kernels=False)


def test_commands(tmp_path, capsys):
    path = a_matmul(tmp_path / "dense.onnx", sparse((64, 48), 0.8))
    assert main(["pack", str(path), "-o", str(tmp_path / "p.onnx")]) == 0
    assert "packed: 1 weights" in capsys.readouterr().out
    assert main(["unpack", str(tmp_path / "p.onnx"), "-o", str(tmp_path / "b.onnx"), "--json"]) == 0
    assert '"dense": 1' in capsys.readouterr().out
    assert main(["pack", str(tmp_path / "p.onnx"), "-o", str(tmp_path / "q.onnx")]) == 2
    assert "no weight gets smaller" in capsys.readouterr().err


def broken(change, int4=False):
    """One way of being malformed: what `change` does to the model, its node, mask and values."""
    return pytest.param(change, int4, id=change.__name__)


def node_of(model):
    return model.graph.node[0]


def tensor_of(model, index):
    name = node_of(model).input[index]
    return next(t for t in model.graph.initializer if t.name == name)


def replace_data(tensor, array):
    tensor.ClearField("dims")
    tensor.dims.extend(array.shape)
    tensor.raw_data = array.tobytes()


def _version(model):
    next(e for e in model.opset_import if e.domain == "elsa").version = 2


def _no_version(model):
    del model.opset_import[1]


def _unknown_operator(model):
    node_of(model).op_type = model.functions[0].name = "UnpackDelta"


def _missing_function(model):
    del model.functions[0]


def _other_function(model):
    model.functions[0].node[-1].attribute[0].ints[:] = [0, 1]


def _old_operator_set(model):
    model.opset_import[0].version = 12


def _a_third_input(model):
    node_of(model).input.append("x")


def _mask_is_an_input(model):
    node_of(model).input[0] = "x"


def _another_attribute(model):
    node_of(model).attribute.append(helper.make_attribute("axis", 1))


def _shape_missing(model):
    node_of(model).attribute.pop()


def _shape_negative(model):
    node_of(model).attribute[0].ints[0] = -48


def _shape_huge(model):
    node_of(model).attribute[0].ints[:] = [1 << 20, 1 << 20]


def _shape_of_three(model):
    node_of(model).attribute[0].ints[:] = [48, 8, 8]


def _cut_wrongly(model):
    node_of(model).op_type = "UnpackCutTransposed"
    model.functions.append(function(VARIANTS["UnpackCutTransposed"], 21))


def _mask_type(model):
    tensor_of(model, 0).data_type = TensorProto.INT8


def _mask_short(model):
    tensor = tensor_of(model, 0)
    replace_data(tensor, np.frombuffer(tensor.raw_data, np.uint8)[:-1])


def _mask_matrix(model):
    tensor = tensor_of(model, 0)
    replace_data(tensor, np.frombuffer(tensor.raw_data, np.uint8).reshape(2, -1))


def _values_type(model):
    tensor = tensor_of(model, 1)
    tensor.data_type = TensorProto.INT32


def _values_matrix(model):
    tensor_of(model, 1).dims.append(1)


def _values_empty(model):
    replace_data(tensor_of(model, 1), np.zeros(0, np.float32))


def _a_value_less(model):
    tensor = tensor_of(model, 1)
    replace_data(tensor, np.frombuffer(tensor.raw_data, np.float32)[:-1])


def _a_value_more(model):
    tensor = tensor_of(model, 1)
    replace_data(tensor, np.append(np.frombuffer(tensor.raw_data, np.float32), np.float32(1)))


def _a_value_that_is_the_fill_value(model):
    tensor = tensor_of(model, 1)
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    values[5] = 0
    tensor.raw_data = values.tobytes()


def _in_a_subgraph(model):
    call = model.graph.node[0]
    inner = helper.make_graph([call], "inner", [], [value(call.output[0], [64, 48])])
    made = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)
    model.graph.node.append(made)


def _a_byte_less(model):
    tensor = tensor_of(model, 1)
    replace_data(tensor, np.frombuffer(tensor.raw_data, np.uint8)[:-1])


def _a_bit_more(model):
    tensor = tensor_of(model, 0)
    mask = np.frombuffer(tensor.raw_data, np.uint8).copy()
    mask[np.flatnonzero(mask != 255)[0]] = 255
    tensor.raw_data = mask.tobytes()


@pytest.mark.parametrize(
    ("change", "int4"),
    [broken(each) for each in (
        _version, _no_version, _unknown_operator, _missing_function, _other_function,
        _old_operator_set, _a_third_input, _mask_is_an_input, _another_attribute, _shape_missing,
        _shape_negative, _shape_huge, _shape_of_three, _cut_wrongly, _mask_type, _mask_short,
        _mask_matrix, _values_type, _values_matrix, _values_empty, _a_value_less, _a_value_more,
        _a_value_that_is_the_fill_value, _in_a_subgraph, _a_bit_more,
    )] + [broken(_a_byte_less, True), broken(_a_bit_more, True), broken(_old_operator_set, True)],
)  # fmt: skip
def test_malformed_files_are_refused(tmp_path, change, int4):
    if int4:
        test_int4_round_trips_and_runs(tmp_path)
        path = tmp_path / "p.onnx"
    else:
        path = tmp_path / "p.onnx"
        pack_file(a_matmul(tmp_path / "dense.onnx", sparse((64, 48), 0.8)), path)
    inspect(path)
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserInputError, match=r"pack|Unpack|mask|values") as found:
        inspect(path)
    assert "get it again" in str(found.value)


def test_a_bit_behind_the_end_is_refused(tmp_path):
    path = tmp_path / "p.onnx"
    pack_file(a_matmul(tmp_path / "dense.onnx", sparse((37, 51), 0.8)), path)
    model = onnx.load(path)
    tensor = tensor_of(model, 0)
    mask = np.frombuffer(tensor.raw_data, np.uint8).copy()
    mask[-1] |= 128
    tensor.raw_data = mask.tobytes()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserInputError, match="behind its last entry"):
        inspect(path)


def test_random_damage_never_crashes(tmp_path, capsys):
    """Bytes of a sound packed file are changed: it is refused, or still explained and run."""
    path = tmp_path / "p.onnx"
    pack_file(a_tied_model(tmp_path / "dense.onnx", sparse((96, 40), 0.85)), path)
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    codes = set()
    for number in range(120):
        damaged = bytearray(sound)
        for place in random.integers(0, len(damaged), random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(bytes(damaged))
        code = main(["unpack", str(path), "-o", str(tmp_path / "b.onnx")])
        codes.add(code)
        if code == 0 and number % 4 == 0:
            for ours in (False, *([True] if kernels.available()[0] else [])):
                with contextlib.suppress(ElsaError):
                    opened = runtime.session(path, 1, "cpu", kernels=ours)
                    with contextlib.suppress(Exception):  # what onnxruntime says of its nodes
                        opened.run(None, {"ids": np.array([0, 95])})
            codes.add(main(["explain", str(path)]))
        captured = capsys.readouterr()
        assert "internal error" not in captured.err, bytes(damaged)
    assert codes <= {0, 2, 3, 4}
    assert {0, 2} <= codes
