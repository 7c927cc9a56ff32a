"""The operator for NVIDIA GPUs in onnxruntime: emulated on the CPU, on a GPU where there is one."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from elsa_compile.runtime import cuda_library, cuda_session, session
from elsa_compile.runtime.bitmask import encode
from elsa_compile.runtime.cuda_products import rewrite
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.onnx_file import inspect, load_checked
from elsa_compile.runtime.pack_file import pack_file

SOURCE = Path(__file__).parents[2] / "runtime" / "native"
TOOLS = Path(__file__).parents[2] / "tools"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")


def build(folder, target, *options):
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake and a C++ compiler are needed")
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder), "-DELSA_WERROR=ON", *options],
        ["cmake", "--build", str(folder), "--target", target],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "cuda" / f"lib{target}.so"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library whose kernels a host compiler has built."""
    return build(tmp_path_factory.mktemp("emulated"), "elsa_cuda_emulated")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library as nvcc builds it."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is needed")
    return build(tmp_path_factory.mktemp("compiled"), "elsa_cuda", "-DELSA_CUDA=ON")


def sparse(shape, sparsity, seed=0):
    random = np.random.default_rng(seed)
    weight = random.standard_normal(shape, dtype=np.float32)
    weight[random.random(shape) < sparsity] = 0
    return weight


def product(weight, dtype, kind, bias=None):
    """A model of one PackedMatMul, and the weight (N, K) it multiplies with, in float64."""
    scales = None
    if dtype == "int8":
        scales = (np.arange(len(weight)) % 3 + 1).astype(np.float32) / 40
        stored = np.clip(np.rint(weight * 40), -127, 127).astype(np.int8)
        truth = stored.astype(np.float64) * scales[:, None]
    else:
        stored = weight.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        truth = stored.astype(np.float64)
    mask, values = encode(stored)
    given = {"mask": mask, "values": values, "scales": scales, "bias": bias}
    reads = ["x", *(name if array is not None else "" for name, array in given.items())]
    node = helper.make_node(
        "PackedMatMul", reads, ["y"], domain="elsa", rows=len(weight), columns=weight.shape[1]
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TYPES[kind], None)],
        [helper.make_tensor_value_info("y", TYPES[kind], None)],
        [numpy_helper.from_array(a, name) for name, a in given.items() if a is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("elsa", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), truth


def opened(model, library, provider="CPUExecutionProvider"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=[provider])


def close(found, truth, dtype, kind, columns):
    # Rounding of sums, of the result, and of int8 values that are written out in x's type.
    unit = 2.0**-11 if kind == "float16" else columns * 2.0**-24
    return np.abs(found - truth).max() <= 4 * unit * max(1.0, np.abs(truth).max())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_operator_multiplies(emulated, tokens, dtype, kind):
    check_product(emulated, "CPUExecutionProvider", (100, 300), (2, tokens), dtype, kind)


def check_product(library, provider, shape, batch, dtype, kind):
    bias = sparse(shape[:1], 0, 2).astype(kind)
    model, weight = product(sparse(shape, 0.8), dtype, kind, bias)
    x = sparse((*batch, shape[1]), 0, 1).astype(kind)
    found = opened(model, library, provider).run(None, {"x": x})[0]
    assert found.dtype == kind
    truth = x.astype(np.float64) @ weight.T + bias
    assert found.shape == truth.shape
    assert close(found, truth, dtype, kind, shape[1])


def test_no_tokens_and_one_dimension(emulated):
    model, weight = product(sparse((40, 70), 0.5), "float32", "float32")
    opened_once = opened(model, emulated)
    assert opened_once.run(None, {"x": np.zeros((0, 70), np.float32)})[0].shape == (0, 40)
    x = sparse(70, 0, 1)
    assert np.allclose(opened_once.run(None, {"x": x})[0], weight @ x, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.graph.node[0].attribute[0].__setattr__("i", 0), "wanted 1 to 2^31"),
        (lambda m: m.graph.node[0].attribute[1].__setattr__("i", 41), "a mask of"),
        (lambda m: m.graph.initializer[1].raw_data.__len__() and grow(m), "set bits"),
        (lambda m: m.graph.node[0].input.append("values"), "others have none"),
    ],
    ids=["no columns", "other rows", "too many values", "scales of floats"],
)
def test_malformed_weights_are_refused(emulated, change, said):
    model, _ = product(sparse((40, 70), 0.5), "float32", "float32")
    del model.graph.node[0].input[3:]
    model.graph.node[0].attribute.sort(key=lambda each: each.name)
    change(model)
    with pytest.raises(Exception, match=r"elsa\.PackedMatMul: ") as caught:
        opened(model, emulated)
    assert said in str(caught.value)


def grow(model):
    values = numpy_helper.to_array(model.graph.initializer[1])
    longer = numpy_helper.from_array(np.append(values, np.float32(1)), "values")
    model.graph.initializer[1].CopyFrom(longer)


def test_an_input_of_another_width_is_refused(emulated):
    model, _ = product(sparse((40, 72), 0.5), "float32", "float32")
    with pytest.raises(Exception, match=r"an input that is not \(\.\.\., 72\)"):
        opened(model, emulated).run(None, {"x": np.zeros((2, 70), np.float32)})


def save(path, nodes, tensors, x_shape, external=False):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, size_threshold=0, location="w.data")
    return path


def a_model(path, external=False):
    """Products of every kind that is rewritten, and one that is not."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "plain"], ["a"]),
        node("Cast", ["half"], ["half_wide"], to=1),
        node("MatMul", ["a", "half_wide"], ["b"], name="second"),
        node("DequantizeLinear", ["whole", "scales"], ["whole_wide"], axis=1),
        node("MatMul", ["b", "whole_wide"], ["c"]),
        node("Gemm", ["c", "gemm", "bias"], ["d"], transB=1),
        node("Transpose", ["gemm"], ["turned"], perm=[1, 0]),
        node("MatMul", ["d", "turned"], ["e"]),
        node("Gemm", ["e", "scaled"], ["y"], alpha=2.0),
    ]
    tensors = {
        "plain": sparse((60, 72), 0.8, 1),
        "half": sparse((72, 64), 0.8, 2).astype(np.float16),
        "whole": np.rint(sparse((64, 80), 0.8, 3) * 30).astype(np.int8),
        "scales": np.linspace(0.01, 0.05, 80, dtype=np.float32),
        "gemm": sparse((80, 80), 0.8, 4),
        "bias": sparse(80, 0, 5),
        "scaled": sparse((80, 64), 0.8, 6),
    }
    return save(path, nodes, tensors, ["m", 60], external)


def stock(path, x):
    """What plain onnxruntime gives, with activations that are not rounded."""
    options = onnxruntime.SessionOptions()
    for key, value in session.EXACT.items():
        options.add_session_config_entry(key, value)
    opened_once = onnxruntime.InferenceSession(str(path), options)
    return opened_once.run(None, {"x": x})[0]


def test_products_are_rewritten_and_give_what_they_gave(emulated, tmp_path):
    packed = tmp_path / "packed.onnx"
    pack_file(a_model(tmp_path / "dense.onnx"), packed)
    model = load_checked(inspect(packed))
    made = rewrite(model, tmp_path)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("PackedMatMul") == 5
    assert [why for _, why in made.left] == ["a Gemm with transA, alpha or beta"]
    assert len(made.products) == 5
    # What is not rewritten keeps its function; the others leave nothing behind.
    assert sum(op.startswith("Unpack") for op in ops) == 1
    assert "DequantizeLinear" not in ops
    x = sparse((7, 60), 0, 9)
    wanted = stock(packed, x)
    found = opened(model, emulated).run(None, {"x": x})[0]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("external", [False, True])
def test_a_session_is_prepared(emulated, tmp_path, monkeypatch, external):
    monkeypatch.setenv(cuda_library.ENVIRONMENT, str(emulated))
    packed = tmp_path / "packed.onnx"
    pack_file(a_model(tmp_path / "dense.onnx", external), packed)
    if external:
        onnx.save(onnx.load(packed), packed, save_as_external_data=True, location="p.data",
                  size_threshold=0)  # fmt: skip
    options = onnxruntime.SessionOptions()
    data = cuda_session.prepare(inspect(packed), options, True)
    assert b"PackedMatMul" in data
    x = sparse((1, 60), 0, 9)
    wanted = stock(packed, x)
    opened_once = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found = opened_once.run(None, {"x": x})[0]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.fixture
def as_if_cuda(monkeypatch):
    """A session on "cuda" opens, on the CPU."""
    monkeypatch.setattr(session, "_why_no_cuda", lambda: None)
    monkeypatch.setitem(session._NAMES, "cuda", "CPUExecutionProvider")
    monkeypatch.delenv("ELSA_KERNELS", raising=False)


def test_a_session_multiplies_packed_weights_packed(emulated, tmp_path, monkeypatch, as_if_cuda):
    monkeypatch.setenv(cuda_library.ENVIRONMENT, str(emulated))
    packed, x = tmp_path / "packed.onnx", sparse((20, 60), 0, 9)
    pack_file(a_model(tmp_path / "dense.onnx"), packed)
    wanted = stock(packed, x)
    for kernels in (None, True, False):
        found = session(packed, provider="cuda", kernels=kernels).run(None, {"x": x})[0]
        # Without the operator onnxruntime rounds activations that meet int8 weights.
        allowed = 1e-5 if kernels is not False else 0.1
        assert np.abs(found - wanted).max() <= allowed * np.abs(wanted).max()


def test_missing_cuda_libraries_are_named(compiled, tmp_path, monkeypatch, as_if_cuda):
    monkeypatch.setenv(cuda_library.ENVIRONMENT, str(compiled))
    pack_file(a_model(tmp_path / "dense.onnx"), tmp_path / "packed.onnx")
    with pytest.raises(UserInputError, match="cannot load its CUDA libraries"):
        session(tmp_path / "packed.onnx", provider="cuda")


def test_without_the_library_packed_weights_run_dense_or_not_at_all(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(cuda_library.ENVIRONMENT, str(tmp_path / "none.so"))
    monkeypatch.delenv("ELSA_KERNELS", raising=False)
    dense = a_model(tmp_path / "dense.onnx")
    pack_file(dense, tmp_path / "packed.onnx")
    file, options = inspect(tmp_path / "packed.onnx"), onnxruntime.SessionOptions()
    assert cuda_session.prepare(inspect(dense), options, True) is None
    assert cuda_session.prepare(file, options, False) is None
    with caplog.at_level(logging.WARNING):
        assert cuda_session.prepare(file, options) is None
    assert "packed weights run as dense ones" in caplog.text
    with pytest.raises(UserInputError, match="was not built"):
        cuda_session.prepare(file, options, True)
    with pytest.raises(UserInputError, match="are of the kernels on the CPU"):
        cuda_session.prepare(file, options, {"values": "int8"})


def test_a_library_of_another_version_is_refused(emulated, monkeypatch):
    monkeypatch.setenv(cuda_library.ENVIRONMENT, str(emulated))
    monkeypatch.setattr(cuda_library, "VERSION", 99)
    cuda_library._checked.cache_clear()
    ok, why = cuda_library.available()
    cuda_library._checked.cache_clear()
    assert not ok
    assert "wanted 99" in why


def test_the_compiled_library_loads_without_a_gpu(compiled, monkeypatch):
    monkeypatch.setenv(cuda_library.ENVIRONMENT, str(compiled))
    assert cuda_library.available() == (True, "")
    cuda_library.register(onnxruntime.SessionOptions())


@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_without_nvcc_the_rest_is_built_and_said_so(tmp_path, wanted):
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake and a C++ compiler are needed")
    done = subprocess.run(
        ["cmake", "-S", str(SOURCE), "-B", str(tmp_path), f"-DELSA_CUDA={wanted}"],
        capture_output=True, text=True, env={**os.environ, "CUDACXX": "/no/nvcc"},
    )  # fmt: skip
    assert done.returncode == (0 if wanted == "AUTO" else 1)
    assert "there is no nvcc" in done.stdout + done.stderr


def test_the_benchmark_checks_its_products(emulated, tmp_path):
    report = tmp_path / "cuda.json"
    script = [sys.executable, str(TOOLS / "bench_cuda.py")]
    done = subprocess.run(
        [*script, "--emulate", "--library", str(emulated), "--json", str(report)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TOOLS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results are right") == 4
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == 4
    assert not any("speedup" in row for row in rows)


_SASS = """
.text._ZN4elsa4cuda6decodeILNS0_5ValueE2ELi1EEEvNS0_10DecodeCallE:
        /*0000*/                   LDS R1, [R2] ;
.L_x_1:
        /*0010*/                   LDG.E.64 R4, [R2] ;
        /*0020*/                   PRMT R3, R4, 0x4440, RZ ;
        /*0030*/                   FFMA R5, R3, R3, R5 ;
        /*0040*/                   FFMA R5, R4, R3, R5 ;
        /*0050*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   FFMA R5, R4, R3, R5 ;
        /*0070*/              @P0 BRA `(.L_x_2) ;
        /*0080*/                   EXIT ;
"""


def test_instructions_of_the_main_loop_are_counted():
    rows = count_sass().counts(_SASS)
    assert rows == [
        {"values": "float16", "tokens": 1, "instructions": 5, "values_a_lane": 2,
         "per_nonzero": 2.5, "loads": 1}
    ]  # fmt: skip


def test_the_kernels_stay_inside_their_budget(compiled):
    counter = count_sass()
    if counter.missing_tools():
        pytest.skip("cuobjdump and nvdisasm are needed")
    for arch in ("sm_80", "sm_90"):
        rows = {
            (row["values"], row["tokens"]): row["per_nonzero"]
            for row in counter.counts(counter.disassembled(compiled, arch))
        }
        assert len(rows) == 16
        # 5.66 when it was written; beyond 17 an H200 would wait for instructions, not for memory.
        assert rows["float16", 1] < 6.5
        assert max(rows.values()) < 17


def count_sass():
    spec = importlib.util.spec_from_file_location("count_sass", TOOLS / "count_sass.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpu():
    return session._why_no_cuda() is None


@pytest.mark.gpu
@pytest.mark.skipif(not gpu(), reason="no CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
    @pytest.mark.parametrize("tokens", [1, 2, 3, 8, 17, 200])
    @pytest.mark.parametrize("shape", [(100, 300), (4096, 4096), (1024, 14336)])
    def test_the_operator_multiplies(self, compiled, shape, tokens, dtype, kind):
        check_product(compiled, "CUDAExecutionProvider", shape, (tokens,), dtype, kind)

    def test_a_session_gives_what_the_cpu_gives(self, compiled, tmp_path, monkeypatch):
        monkeypatch.setenv(cuda_library.ENVIRONMENT, str(compiled))
        packed = tmp_path / "packed.onnx"
        pack_file(a_model(tmp_path / "dense.onnx"), packed)
        for tokens in (1, 7, 100):
            x = sparse((tokens, 60), 0, 9)
            wanted = stock(packed, x)
            found = session(packed, provider="cuda", kernels=True).run(None, {"x": x})[0]
            assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()

    def test_a_cuda_graph_repeats_the_product(self, compiled):
        model, weight = product(sparse((512, 8192), 0.8), "float16", "float16")
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(compiled))
        providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
        opened_once = onnxruntime.InferenceSession(model.SerializeToString(), options, providers)
        binding = opened_once.io_binding()
        x = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 8192), np.float16), "cuda", 0)
        y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 512), np.float16), "cuda", 0)
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        for seed in range(4):  # the first runs record
            fresh = sparse((1, 8192), 0, seed).astype(np.float16)
            x.update_inplace(fresh)
            opened_once.run_with_iobinding(binding)
            truth = fresh.astype(np.float64) @ weight.T
            assert close(y.numpy(), truth, "float16", "float16", 8192)
