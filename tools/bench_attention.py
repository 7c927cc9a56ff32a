"""Attention on our kernels against onnxruntime's, inside onnxruntime, in one process.

    python tools/bench_attention.py --json attention.json
    python tools/bench_attention.py --threads 2 --cases 1@128 1@1024 128@0
    python tools/bench_attention.py --isa avx2 --heads 32 --kv-heads 8 --size 128

A model of nothing but layers of RotaryEmbedding and Attention with past and present keys and
values, opened plainly and with our execution provider. Outputs are compared before anything is
timed: all within 2e-6 of the largest. The sessions are then timed in turns, with everything bound;
each ratio, onnxruntime's time over ours, is of two runs that followed each other. A case is new
tokens @ past ones. Caches are copied on both sides; onnxruntime runs at its own best instruction
set always.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from elsa_compile.runtime import kernels, provider
from elsa_compile.runtime.bench import spread
from elsa_compile.runtime.circumstances import machine, versions
from elsa_compile.runtime.kernel_timing import open_sweep, paired_ratios

CASES = ["1@128", "1@512", "1@1024", "1@2048", "4@128", "8@128", "16@128", "32@0", "128@0"]
CASES += ["512@0", "64@512"]
ALLOWED = 2e-6
Feeds = dict[str, NDArray[Any]]


def main() -> int:
    options = _arguments()
    if options.isa:
        os.environ[kernels.ISA_ENVIRONMENT] = options.isa
    data = attention_model(options.layers, options.heads, options.kv_heads, options.size)
    # Only attentions that our kernels compute have shared caches.
    open_sweep(data, options.threads, {"cache": "shared"})
    if len(provider.shared_caches()) != 2 * options.layers:
        raise SystemExit("our kernels do not take these attentions (docs/kernels.md says which)")
    sessions = [open_sweep(data, options.threads, None), open_sweep(data, options.threads, {})]
    rows = []
    for case in options.cases:
        tokens, past = (int(number) for number in case.split("@"))
        feeds = feeds_of(options, tokens, past)
        off = difference(sessions, feeds)
        if not off < ALLOWED:
            raise SystemExit(f"{case}: off by {off:.3g} of the largest value, so it is not timed")
        seconds = time_in_turns(sessions, feeds, tokens, options.repetitions)
        ratios = paired_ratios(*seconds)
        rows.append(
            {
                "tokens": tokens,
                "past": past,
                "onnxruntime_s": spread(seconds[0]),
                "ours_s": spread(seconds[1]),
                "ratio": spread(ratios),
            }
        )
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(
            f"{tokens:4d} new, {past:4d} past: {middle:.2f} ({low:.2f} to {high:.2f})  "
            f"{statistics.median(seconds[1]) * 1e3:.2f} ms for {options.layers} layers",
            flush=True,
        )
    report = {
        "rows": rows,
        "isa": kernels.isa(),
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "machine": machine(),
        "versions": versions(),
        "load_average": os.getloadavg(),
    }
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="NEW@PAST")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=9, help="of queries")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="elements of a head")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--isa", choices=("avx2", "avx512", "avx512vnni"), help="of our kernels")
    parser.add_argument("--json", help="write everything here")
    return parser.parse_args()


def attention_model(layers: int, heads: int, kv_heads: int, size: int) -> bytes:
    """An ONNX file: each layer's queries are the layer before, keys and values the input k."""

    def value(name: str, *shape: str | int, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value("x", "b", "s", heads * size), value("k", "b", "s", kv_heads * size)]
    inputs += [value("mask", "b", 1, "s", "t", kind=TensorProto.BOOL)]
    inputs += [value(name, "b", "s", size // 2) for name in ("cos", "sin")]
    outputs, nodes, x = [], [], "x"
    for i in range(layers):
        for name, source, count in ((f"q{i}", x, heads), (f"k{i}", "k", kv_heads)):
            nodes.append(
                helper.make_node("RotaryEmbedding", [source, "cos", "sin"], [name], num_heads=count)
            )
        kept = [f"{part}{i}" for part in ("keys", "values")]
        inputs += [value(f"past_{name}", "b", kv_heads, "p", size) for name in kept]
        outputs += [value(f"present_{name}", "b", kv_heads, "t", size) for name in kept]
        nodes.append(
            helper.make_node(
                "Attention",
                [f"q{i}", f"k{i}", "k", "mask", *(f"past_{name}" for name in kept)],
                [f"y{i}", *(f"present_{name}" for name in kept)],
                q_num_heads=heads,
                kv_num_heads=kv_heads,
            )
        )
        x = f"y{i}"
    outputs.append(value(x, "b", "s", heads * size))
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data


def feeds_of(options: argparse.Namespace, tokens: int, past: int) -> Feeds:
    """Random inputs; the mask is causal."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    angles = normal(1, tokens, options.size // 2)
    place = past + np.arange(tokens)[:, None]
    feeds: Feeds = {
        "x": normal(1, tokens, options.heads * options.size),
        "k": normal(1, tokens, options.kv_heads * options.size),
        "mask": (np.arange(past + tokens)[None] <= place)[None, None],
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    for i in range(options.layers):
        for part in ("keys", "values"):
            feeds[f"past_{part}{i}"] = normal(1, options.kv_heads, past, options.size)
    return feeds


def difference(sessions: list[Any], feeds: Feeds) -> float:
    """Of all outputs, the largest over the largest value of the output."""
    found = [session.run(None, feeds) for session in sessions]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*found, strict=True))


def time_in_turns(
    sessions: list[Any], feeds: Feeds, tokens: int, repetitions: int
) -> list[list[float]]:
    """Seconds of a run: of ten where one is short. Wall time."""
    runs = 10 if tokens == 1 else 2 if tokens < 128 else 1
    bindings = [_bound(session, feeds) for session in sessions]
    seconds: list[list[float]] = [[] for _ in sessions]
    for repetition in range(repetitions + 1):
        order = list(range(len(sessions)))
        for index in order if repetition % 2 == 0 else reversed(order):
            started = time.perf_counter()
            for _ in range(runs):
                sessions[index].run_with_iobinding(bindings[index])
            if repetition > 0:
                seconds[index].append((time.perf_counter() - started) / runs)
    return seconds


def _bound(session: Any, feeds: Feeds) -> Any:
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return binding


if __name__ == "__main__":
    raise SystemExit(main())
