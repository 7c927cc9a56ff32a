#!/usr/bin/env python3
r"""All pruners on one model, at several sparsities, on equal data: a table, a plot, and JSON lines.

    python tools/compare_pruners.py examples/tiny-llama --data data/all/train.txt \
        --eval-data data/wiki/valid.txt --window 256 --max-windows 64 \
        --steps 1500 --batch-size 16 --sparsity 0.7 0.9 --out build/compare-tiny

One-shot pruners calibrate on the same --samples windows; training ones take the same --steps of the
same --batch-size windows. "dense" is the model as it is, "dense+train" the same training without
pruning: the honest upper reference. Options of its training pass may follow a method's name, as in
elsa:lr=1e-3,closing=0.5: that is how the defaults are held against a grid. Every figure is
perplexity by the protocol of `elsa-run eval`, on text that nothing was trained on. A row is written
as soon as it is known, and rows that are there are not computed again: an interrupted comparison
goes on where it stopped, in the middle of a training run too. --minutes interrupts it by itself,
for machines that are lent by the hour.
"""

import argparse
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import elsa_compile
from elsa_compile import data as data_module
from elsa_compile import pipeline
from elsa_compile.errors import ElsaError
from elsa_compile.pass_base import Context, make_pass
from elsa_compile.progress import open_progress
from elsa_compile.recipe import load_yaml
from elsa_compile.report_plots import line_plot
from elsa_compile.runtime.text import PROTOCOL
from elsa_compile.training_data import training_data

Steps = list[tuple[str, dict[str, Any]]]


def recipe(method: str, sparsity: float, options: argparse.Namespace) -> Steps:
    """(pass, options) of a method, which may carry options of its training pass."""
    training = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        **{key: value for key, value in (("lr", options.lr), ("loss", options.loss)) if value},
        **_settings(method),
    }
    method = method.partition(":")[0]
    samples = {"samples": options.samples}
    uniform: Steps = [("allocate-uniform", {"sparsity": sparsity})]
    by_row: Steps = [("allocate-uniform", {"sparsity": sparsity, "pattern": "row"})]
    one_shot: dict[str, Steps] = {
        "magnitude": [*uniform, ("prune-magnitude", {})],
        "wanda": [*by_row, ("prune-wanda", samples)],
        "sparsegpt": [*uniform, ("prune-sparsegpt", samples)],
        "alps": [*uniform, ("prune-alps", samples)],
    }
    if method == "dense":
        return []
    if method == "dense+train":
        nothing: Steps = [("allocate-uniform", {"sparsity": 0.0}), ("prune-magnitude", {})]
        return [*nothing, ("finetune-masked", training)]
    if method in one_shot:
        return one_shot[method]
    if method.removesuffix("+train") in one_shot:
        return [*one_shot[method.removesuffix("+train")], ("finetune-masked", training)]
    fisher: Steps = [("allocate-fisher", {"sparsity": sparsity, **samples})]
    if method == "elsa-uniform":
        return [*uniform, ("prune-elsa", training)]
    if method == "elsa":
        return [*fisher, ("prune-elsa", training)]
    if method == "elsa-l":
        low = {"states": "int8", "merged_state": "bf16"}
        return [*fisher, ("prune-elsa", training | low)]
    if method == "fisher+alps":
        return [*fisher, ("prune-alps", samples)]
    raise SystemExit(f"there is no method {method!r}")


METHODS = (
    "dense", "dense+train", "magnitude", "wanda", "sparsegpt", "alps", "magnitude+train",
    "sparsegpt+train", "fisher+alps", "elsa-uniform", "elsa", "elsa-l",
)  # fmt: skip


def _settings(method: str) -> dict[str, Any]:
    """The options behind a method's name, values read as in a recipe file."""
    given = [text.partition("=") for text in method.partition(":")[2].split(",") if text]
    return {key: load_yaml(value, f"{method}: {key}") for key, _, value in given}


def _method(text: str) -> str:
    """A method's name, perhaps with options of its training pass."""
    name, colon, _ = text.partition(":")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    trains = name.startswith("elsa") or name.endswith("+train")
    if colon and not (trains and _settings(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted elsa:key=value,key=value or the like")
    return text


def measure(method: str, sparsity: float, options: argparse.Namespace) -> dict[str, Any]:
    """One row: prune a fresh copy of the model, measure it."""
    started = time.perf_counter()
    program = elsa_compile.load(options.model)
    passes = [make_pass(name, given) for name, given in recipe(method, sparsity, options)]
    samples = data_module.load_samples(program, options.data, options.window)
    cache = options.out / "tokens"
    work = options.out / f"{method}-{sparsity:g}.resume"
    with open_progress("plain") as progress:
        stream = training_data(
            program, options.data, window=options.window, cache=cache, progress=progress
        )
        device = torch.device(options.device)
        ctx = Context(samples, device, options.seed, progress, stream, work)
        pipeline.run(program, passes, ctx)
    windows = data_module.text_windows(
        program, options.eval_data, options.window, options.max_windows
    )
    found = data_module.perplexity(program, windows)
    training = [r for r in program.history if "tokens" in r.stats.counts]
    tokens = sum(r.stats.counts["tokens"] for r in training)
    pruned = [w.parameter for w, _ in program.planned()]
    zeros = sum(int((p == 0).sum()) for p in pruned)
    return {
        "method": method,
        "sparsity": sparsity,
        "measured_sparsity": zeros / max(1, sum(p.numel() for p in pruned)),
        "perplexity": found["perplexity"],
        "tokens_measured": found["tokens"],
        "passes": [{"name": p.name, **p.options()} for p in passes],
        "counts": program.history[-1].stats.counts if passes else {},
        "seconds": time.perf_counter() - started,
        "tokens_a_second": tokens / sum(r.seconds for r in training) if tokens else None,
        "peak_memory_mib": peak_memory_mib(device),
        "threads": torch.get_num_threads(),
        "device": options.device,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def peak_memory_mib(device: torch.device) -> float:
    """Of the device since its last row, or of this process since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The comparison as Markdown."""
    sparsities = sorted({row["sparsity"] for row in rows if not row["method"].startswith("dense")})
    lines = [
        f"Perplexity on {options.eval_data.name}, windows of {options.window}, at most "
        f"{options.max_windows}; {PROTOCOL}.",
        "",
        "| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |",
        "|---|" + "---|" * len(sparsities),
    ]
    listed = {row["method"] for row in rows}
    for method in sorted(listed, key=lambda m: (METHODS.index(m.partition(":")[0]), m)):
        found = {row["sparsity"]: row["perplexity"] for row in rows if row["method"] == method}
        if method.startswith("dense"):
            found = dict.fromkeys(sparsities, next(iter(found.values()))) if found else {}
        if found:
            cells = (f"{found[s]:.2f}" if s in found else "" for s in sparsities)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> str:
    """Perplexity over sparsity as a self-contained HTML page."""
    held: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: float(row["sparsity"])):
        if not row["method"].startswith("dense"):
            point = (row["sparsity"], row["perplexity"])
            held.setdefault(row["method"], []).append(point)
    picture = line_plot("perplexity", held, True, "sparsity") if held else ""
    style = (
        ":root{--one:#2f6fd0;--two:#d9822b;--good:#1f8a4c}svg text{font:11px sans-serif}"
        ".axis{stroke:#ccc}svg{width:60rem;max-width:100%;height:auto}"
    )
    return f"<!doctype html><meta charset=utf-8><style>{style}</style>{picture}\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, table and plot")
    parser.epilog = f"methods: {', '.join(METHODS)}"
    parser.add_argument("--methods", nargs="+", default=METHODS, type=_method, metavar="METHOD")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=50)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="default: auto")
    parser.add_argument("--loss", help="default: auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--minutes", type=float, help="stop by then; the same command goes on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.minutes:
        stop = threading.Timer(60 * options.minutes, os.kill, (os.getpid(), signal.SIGINT))
        stop.daemon = True
        stop.start()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    try:
        for sparsity in options.sparsity:
            for method in options.methods:
                level = 0.0 if method.startswith("dense") else sparsity
                if any(r["method"] == method and r["sparsity"] == level for r in rows):
                    continue
                rows.append(measure(method, level, options))
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                (options.out / "table.md").write_text(table(rows, options))
                (options.out / "plot.html").write_text(plot(rows))
                print(f"{method} at {level:g}: perplexity {rows[-1]['perplexity']:.3f}", flush=True)
    except ElsaError as error:
        print(f"compare_pruners: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("compare_pruners: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(table(rows, options), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
