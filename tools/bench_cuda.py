"""Packed products on an NVIDIA GPU against cuBLAS, inside onnxruntime, as CUDA graphs.

    python tools/bench_cuda.py --build --json cuda.json     # everything, at most ten minutes
    python tools/bench_cuda.py --shapes 4096x14336 --sparsities 0.9 --tokens 1
    python tools/bench_cuda.py --emulate                    # no GPU: that the script works

A case is two models of many products of one shape, x (tokens, K) with weights (N, K): one with
elsa.PackedMatMul, one with onnxruntime's MatMul in float16, which is cuBLAS. Each has so many
matrices that it exceeds the second cache (--sweep-mib). Both are recorded as CUDA graphs, results
are compared with float64, then graphs are replayed in turns; a ratio is of two runs that followed
each other, and times are those of one product. Where torch has CUDA, its own product of the same
dense weights, replayed as a graph, stands beside. GB/s are packed bytes over time.

The shapes are those of models of 1 to 8 billion parameters. Cases that --seconds leaves no time for
are listed in the JSON under "left". --build compiles libelsa_cuda with cmake and nvcc into
build/bench_cuda first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from elsa_compile.runtime import bitmask, cuda_library
from elsa_compile.runtime.bench import spread, verdict
from elsa_compile.runtime.circumstances import machine, versions

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("4096x14336", "14336x4096", "4096x4096", "2048x8192", "1024x4096")  # N x K
SPARSITIES = (0.9, 0.5, 0.7, 0.8, 0.95)
VALUES = ("float16", "int8")
Array = NDArray[Any]


def main() -> int:
    options = _arguments()
    started = time.perf_counter()
    if options.build:
        options.library = build("elsa_cuda_emulated" if options.emulate else "elsa_cuda")
    if not Path(options.library).exists():
        sys.exit(f"bench_cuda: there is no {options.library}; give --build, or --library PATH")
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for shape in options.shapes:
        n, k = (int(size) for size in shape.split("x"))
        for sparsity in options.sparsities:
            for values in options.values:
                if time.perf_counter() - started > options.seconds:
                    left.append(f"{shape} at {sparsity} {values}")
                    continue
                rows += measure(n, k, sparsity, values, options)
                write(options, rows, left)
    write(options, rows, left)
    for case in left:
        print(f"no time left for {case}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--values", nargs="+", default=VALUES, choices=VALUES)
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 2, 4, 8, 16, 128))
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--sweep-mib", type=int, default=192, help="bytes of a model's weights")
    parser.add_argument("--seconds", type=float, default=480, help="start no case after so long")
    parser.add_argument("--library", default=str(cuda_library.library_path()))
    parser.add_argument("--build", action="store_true", help="compile the library first")
    parser.add_argument("--emulate", action="store_true", help="tiny, on the CPU, no figures")
    parser.add_argument("--json", help="write everything here, after every case")
    options = parser.parse_args()
    if options.emulate:
        options.shapes, options.sparsities, options.tokens = ("256x320",), (0.8,), (1, 20)
        options.repetitions, options.sweep_mib = 2, 0
    return options


def build(target: str) -> str:
    """Path of a library compiled from the sources."""
    folder = ROOT / "build" / "bench_cuda"
    wanted = ["-DELSA_CUDA=ON"] if target == "elsa_cuda" else []
    for command in (
        ["cmake", "-S", str(ROOT / "runtime" / "native"), "-B", str(folder), *wanted],
        ["cmake", "--build", str(folder), "--target", target, "--parallel"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"bench_cuda: {' '.join(command)} fails:\n{done.stderr or done.stdout}")
    return str(folder / "cuda" / f"lib{target}.so")


def write(options: argparse.Namespace, rows: list[dict[str, Any]], left: list[str]) -> None:
    if not options.json:
        return
    report = {
        "rows": rows,
        "left": left,
        "gpu": "emulated, no figures" if options.emulate else gpu_name(),
        "repetitions": options.repetitions,
        "sweep_mib": options.sweep_mib,
        "machine": machine(),
        "versions": versions(),
    }
    Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def gpu_name() -> str:
    """What the driver calls the GPU, with its clocks and driver."""
    query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem"
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True)
    return done.stdout.decode().strip() or "unknown"


def stored(weight: Array, values: str) -> tuple[Array, Array | None]:
    """A weight as it is packed, and its scales."""
    if values == "float16":
        return weight.astype(np.float16), None
    scales = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    scales[scales == 0] = 1
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def sparse_model(weight: Array, values: str, copies: int) -> tuple[bytes, int]:
    """Products with one weight, stored `copies` times; and the packed bytes of one."""
    held, scales = stored(weight, values)
    mask, packed = bitmask.encode(held)
    nodes, tensors = [], []
    for copy in range(copies):
        given = {f"mask{copy}": mask, f"values{copy}": packed}
        if scales is not None:
            given[f"scales{copy}"] = scales
        tensors += [numpy_helper.from_array(array, name) for name, array in given.items()]
        n, k = weight.shape
        nodes.append(
            helper.make_node(
                "PackedMatMul", ["x", *given], [f"y{copy}"], domain="elsa", rows=n, columns=k
            )
        )
    return model(nodes, tensors, weight.shape, copies), mask.nbytes + packed.nbytes


def dense_model(weight: Array, copies: int) -> bytes:
    """The same with onnxruntime's MatMul."""
    turned = np.ascontiguousarray(weight.T.astype(np.float16))
    tensors = [numpy_helper.from_array(turned, f"w{copy}") for copy in range(copies)]
    nodes = [helper.make_node("MatMul", ["x", f"w{copy}"], [f"y{copy}"]) for copy in range(copies)]
    return model(nodes, tensors, weight.shape, copies)


def model(nodes: list[Any], tensors: list[Any], shape: tuple[int, ...], copies: int) -> bytes:
    n, k = shape
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", half, ["m", k])],
        [helper.make_tensor_value_info(f"y{copy}", half, ["m", n]) for copy in range(copies)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("elsa", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    data: bytes = made.SerializeToString()
    return data


class Replayed:
    """A session whose inputs and outputs stay where they are, so that its graph can be replayed."""

    def __init__(self, data: bytes, x: Array, rows: int, copies: int, library: str, gpu: bool):
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.register_custom_ops_library(library)
        providers: list[Any] = ["CPUExecutionProvider"]
        if gpu:
            providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
        self.session = onnxruntime.InferenceSession(data, settings, providers=providers)
        if gpu and "CUDAExecutionProvider" not in self.session.get_providers():
            sys.exit("bench_cuda: onnxruntime cannot use CUDA here; --emulate needs no GPU")
        place = "cuda" if gpu else "cpu"
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        self.x = make(x, place, 0)
        shape = (len(x), rows)
        self.y = [make(np.zeros(shape, np.float16), place, 0) for _ in range(copies)]
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input("x", self.x)
        for copy, y in enumerate(self.y):
            self.binding.bind_ortvalue_output(f"y{copy}", y)

    def run(self) -> float:
        """Seconds of one replay; onnxruntime waits for the GPU at its end."""
        started = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - started

    def results(self) -> list[Array]:
        """Of a run."""
        self.run()
        return [y.numpy() for y in self.y]


def measure(
    n: int, k: int, sparsity: float, values: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All numbers of tokens of one weight."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((n, k), dtype=np.float32)
    weight[random.random((n, k), dtype=np.float32) < sparsity] = 0
    sweep, gpu = options.sweep_mib * 2**20, not options.emulate
    held, scales = stored(weight, values)
    truth = held.astype(np.float64) * (1.0 if scales is None else scales[:, None])
    expected_bytes = n * k * (1 - sparsity) * (3 if values == "float16" else 2)
    copies = [max(2, int(sweep // expected_bytes)), max(2, sweep // (n * k * 2))]
    sparse, packed_bytes = sparse_model(weight, values, copies[0])
    dense = dense_model(truth, copies[1])
    rows = []
    for tokens in options.tokens:
        x = random.standard_normal((tokens, k)).astype(np.float16)
        pair = [
            Replayed(data, x, n, number, options.library, gpu)
            for data, number in zip((dense, sparse), copies, strict=True)
        ]
        check([each.results() for each in pair], x, truth)
        row: dict[str, Any] = {
            "shape": [n, k],
            "sparsity": sparsity,
            "values": values,
            "tokens": tokens,
            "copies": copies,
            "packed_bytes": packed_bytes,
        }
        if gpu:
            seconds = in_turns(pair, copies, options.repetitions)
            row |= figures(seconds, packed_bytes)
            row["torch_s"] = torch_seconds(truth, x, copies[1], options.repetitions)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def figures(seconds: list[list[float]], packed_bytes: int) -> dict[str, Any]:
    """Of the seconds of one product, dense and sparse."""
    ratios = [before / after for before, after in zip(*seconds, strict=True)]
    return {
        "cublas_s": spread(seconds[0]),
        "sparse_s": spread(seconds[1]),
        "speedup": {**spread(ratios), "verdict": verdict(ratios)},
        "gb_per_s": packed_bytes / statistics.median(seconds[1]) / 1e9,
    }


def check(results: list[Any], x: Array, truth: Array) -> None:
    """Every result against float64; stops everything when one is off."""
    wanted = x.astype(np.float64) @ truth.T
    allowed = 2.0**-8 * np.abs(wanted).max()
    for found in (each for of_model in results for each in of_model):
        off = float(np.abs(found - wanted).max())
        if not off <= allowed:
            sys.exit(f"bench_cuda: a result is off by {off:.3g}, allowed {allowed:.3g}")


def in_turns(pair: list[Replayed], copies: list[int], repetitions: int) -> list[list[float]]:
    """Seconds of one product; who goes first alternates. The first runs record the graphs."""
    seconds: list[list[float]] = [[] for _ in pair]
    for repetition in range(repetitions + 3):
        order = (0, 1) if repetition % 2 == 0 else (1, 0)
        for which in order:
            took = pair[which].run() / copies[which]
            if repetition >= 3:
                seconds[which].append(took)
    return seconds


def torch_seconds(truth: Array, x: Array, copies: int, repetitions: int) -> dict[str, float] | None:
    """Torch's own dense product as a graph; None where torch has no CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    weights = [torch.from_numpy(truth.astype(np.float16)).cuda() for _ in range(copies)]
    given = torch.from_numpy(x).cuda()
    for weight in weights[:2]:
        torch.nn.functional.linear(given, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            torch.nn.functional.linear(given, weight)
    seconds = []
    for _ in range(repetitions + 3):
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / copies)
    return spread(seconds[3:])


def line(row: dict[str, Any]) -> str:
    n, k = row["shape"]
    case = f"{n:5}x{k:<5} {row['sparsity']:.0%} {row['values']:8} M={row['tokens']:<4}"
    if "speedup" not in row:
        return f"{case} results are right"
    speedup = row["speedup"]
    return (
        f"{case} {speedup['median']:6.2f}x cuBLAS ({speedup['min']:.2f} to {speedup['max']:.2f}) "
        f"{row['sparse_s']['median'] * 1e6:8.1f} us {row['gb_per_s']:7.1f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
