"""Sparse kernels against onnxruntime's dense float32 MatMul, inside onnxruntime, in one process.

    python tools/bench_kernels.py --json kernels.json
    python tools/bench_kernels.py --shapes 2048x2048 --types int8 --tokens 1 128 --threads 2
    python tools/bench_kernels.py --quick            # a few seconds, for a first look

Each case is a model of many different matrices of one shape, enough to exceed the caches
(--sweep-mib), opened plainly and with our execution provider. Results are checked against float64
before anything is timed. The sessions are then timed in turns; each ratio is of two runs that
followed each other. With one thread the clock is that of the thread's own processor time, so that a
machine which is also busy with other things says nearly the same. GB/s are packed bytes over time.
--cost-table prints the medians as rows of runtime/native/cost.cpp.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from elsa_compile.runtime import kernels, packed, provider, reference
from elsa_compile.runtime.bench import spread, verdict
from elsa_compile.runtime.circumstances import machine, versions
from elsa_compile.runtime.kernel_timing import (
    check_sweep,
    open_sweep,
    paired_ratios,
    sparse_matrices,
    sweep_model,
    time_in_turns,
)

SHAPES = ("576x576", "1536x576", "576x1536", "192x576", "2048x2048", "8192x2048")  # N x K
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
ISAS = ("portable", "avx2", "avx512", "avx512vnni")


def main() -> int:
    options = _arguments()
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        n, k = (int(size) for size in shape.split("x"))
        copies = max(2, options.sweep_mib * 2**20 // (n * k * 4))
        for sparsity in options.sparsities:
            rows += measure(n, k, copies, sparsity, options)
    if options.cost_table:
        print_cost_table(rows)
    report = {
        "rows": rows,
        "threads": options.threads,
        "clock": options.clock,
        "repetitions": options.repetitions,
        "sweep_mib": options.sweep_mib,
        "machine": machine() | {"features": kernels.cpu_features()},
        "load_average": os.getloadavg(),
        "versions": versions(),
    }
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--types", nargs="+", default=reference.DTYPES, choices=reference.DTYPES)
    parser.add_argument(
        "--formats", nargs="+", default=reference.FORMATS, choices=packed.KERNEL_FORMATS
    )
    parser.add_argument("--isas", nargs="+", choices=ISAS, help="default: the best of this machine")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 128))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--sweep-mib", type=int, default=256, help="dense bytes of one case")
    parser.add_argument("--clock", choices=("cpu", "wall"), help="default: cpu with one thread")
    parser.add_argument("--json", help="write everything here")
    parser.add_argument("--cost-table", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one shape, few cases and repetitions")
    options = parser.parse_args()
    options.isas = options.isas or [kernels.isa()]
    options.clock = options.clock or ("cpu" if options.threads == 1 else "wall")
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts the caller's thread alone; give --threads 1")
    if options.quick:
        options.shapes, options.sparsities = ("576x576",), (0.5, 0.8, 0.95)
        options.repetitions, options.sweep_mib = 5, 32
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Instruction set, format and type of each case."""
    for isa in options.isas:
        for form in options.formats:
            for dtype in options.types:
                yield isa, form, dtype


def measure(
    n: int, k: int, copies: int, sparsity: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All cases of one shape and sparsity."""
    random = np.random.default_rng(0)
    weights = sparse_matrices((k, n), sparsity, copies, random)
    data = sweep_model(weights, copies)
    dense = open_sweep(data, options.threads, None)
    rows = []
    for isa, form, dtype in cases(options):
        os.environ[kernels.ISA_ENVIRONMENT] = isa
        choice = {"values": dtype, "format": form, "least_gain": "0"}
        session = open_sweep(data, options.threads, choice)
        claims = provider.claims()
        assert all(claim["format"] == form for claim in claims), claims[0]
        for tokens in options.tokens:
            lanes = tokens <= 4  # what more tokens read is not known here
            packed_bytes = sum(
                (lanes and claim["lane_bytes"]) or claim["bytes"] for claim in claims
            )
            x = random.standard_normal((tokens, k), dtype=np.float32)
            check_sweep(session, x, weights[0], dtype)
            clock = time.thread_time if options.clock == "cpu" else time.perf_counter
            seconds = time_in_turns([dense, session], x, options.repetitions, clock)
            ratios = paired_ratios(*seconds)
            row = {
                "shape": [n, k],
                "copies": copies,
                "sparsity": sparsity,
                "isa": isa,
                "format": form,
                "type": dtype,
                "tokens": tokens,
                "dense_s": spread([s / copies for s in seconds[0]]),
                "sparse_s": spread([s / copies for s in seconds[1]]),
                "speedup": {**spread(ratios), "verdict": verdict(ratios)},
                "packed_bytes": packed_bytes // copies,
                "gb_per_s": packed_bytes / statistics.median(seconds[1]) / 1e9,
            }
            rows.append(row)
            print(line(row), flush=True)
        del session
    del os.environ[kernels.ISA_ENVIRONMENT]
    return rows


def line(row: dict[str, Any]) -> str:
    n, k = row["shape"]
    speedup = row["speedup"]
    return (
        f"{n:5}x{k:<5} {row['sparsity']:.0%} {row['isa']:10} {row['format']:6} {row['type']:8} "
        f"M={row['tokens']:<4} {speedup['median']:6.2f}x "
        f"({speedup['min']:.2f} to {speedup['max']:.2f}) {row['sparse_s']['median'] * 1e6:9.1f} us "
        f"{row['gb_per_s']:5.1f} GB/s"
    )


def print_cost_table(rows: list[dict[str, Any]]) -> None:
    """Median speed-ups of one token over all shapes, as cost.cpp has them."""
    gains: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for row in rows:
        if row["tokens"] == 1:
            key = (row["isa"], row["type"], row["format"])
            gains.setdefault(key, {}).setdefault(row["sparsity"], []).append(
                row["speedup"]["median"]
            )
    for (isa, dtype, form), by_sparsity in sorted(gains.items()):
        numbers = [f"{statistics.median(v):.2f}" for _, v in sorted(by_sparsity.items())]
        print(f"{isa} {dtype} {form}: {{{', '.join(numbers)}}}")


if __name__ == "__main__":
    sys.exit(main())
