"""elsa-run calibrate: the command around `calibrate`."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from elsa_compile.runtime.command_line import print_json

TEXT = """\
Measures the kernel table of this machine: the sparse kernels against onnxruntime's dense product,
by type of values, zeros, size of the matrix, for 1 token and for 128. It takes some minutes, needs
2 GB of memory, and is kept in the cache folder (XDG_CACHE_HOME, else ~/.cache) for this processor,
instruction set, number of threads, onnxruntime and library of kernels. allocate-budget solves for a
latency with it. (The expectations of `elsa-run explain` are a fixed table; --measure measures.)
"""
EPILOG = """\
examples:
  elsa-run calibrate --threads 1
  elsa-run calibrate --threads 1 --show
  elsa-run calibrate --threads 1 --show --json | jq .rows
"""
_TYPES = ("float32", "bfloat16", "float16", "int8")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.set_defaults(command=run)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of one product; default all cores"
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=_TYPES,
        metavar="TYPE",
        help=f"of values: {', '.join(_TYPES)}; default float32 bfloat16 int8, which elsa-compile "
        "writes",
    )
    parser.add_argument("--repetitions", type=int, metavar="N", help="default 7")
    parser.add_argument("--show", action="store_true", help="print the kept table, measure nothing")


def run(options: argparse.Namespace) -> int:
    """Measure and keep, or show."""
    from elsa_compile.runtime import calibrate
    from elsa_compile.runtime.errors import UserInputError

    if options.show and (options.types or options.repetitions is not None):
        raise UserInputError(
            "--show prints what was measured, so --types and --repetitions mean nothing with it; "
            "leave them out, or leave out --show to measure again"
        )
    repetitions = 7 if options.repetitions is None else options.repetitions
    if repetitions < 2:
        raise UserInputError(f"--repetitions is {repetitions}, wanted at least 2")
    if options.show:
        table = calibrate.load(options.threads)
    else:
        table = calibrate.calibrate(
            options.threads,
            types=options.types or calibrate.TYPES,
            repetitions=repetitions,
            progress=lambda said: print(f"elsa-run: {said}", file=sys.stderr, flush=True),
        )
        print(f"elsa-run: wrote {calibrate.save(table)}", file=sys.stderr)
    found = table.to_json() | {"file": str(table.machine.file)}
    if options.json:
        print_json(found)
    else:
        print(shown(found))
    return 0


def shown(table: Mapping[str, Any]) -> str:
    """A table for people: speed-ups by shape and type, a column for each sparsity."""
    from elsa_compile.runtime import display

    about = table["machine"]
    sparsities = sorted({row["sparsity"] for row in table["rows"]})
    parts = [
        f"{about['cpu']}, {about['isa']}, {about['threads']} thread(s), onnxruntime "
        f"{about['onnxruntime']}\n  measured {table['created']} in {table['seconds']:.0f} s; "
        f"memory is read at {table['read_gb_per_s']:.1f} GB/s"
    ]
    for tokens in sorted({row["tokens"] for row in table["rows"]}):
        lines = [["N x K", "values", *(f"{s:.0%}" for s in sparsities), "dense int8"]]
        made: dict[tuple[str, str], dict[float, Mapping[str, Any]]] = {}
        for row in table["rows"]:
            if row["tokens"] == tokens:
                key = ("{} x {}".format(*row["shape"]), row["type"])
                made.setdefault(key, {})[row["sparsity"]] = row
        for (shape, kind), by_sparsity in made.items():
            cells = [by_sparsity.get(s) for s in sparsities]
            stock = [
                row["dense_s"]["median"] / row["stock_s"]["median"]
                for row in by_sparsity.values()
                if "stock_s" in row
            ]
            lines.append([
                shape, kind,
                *("-" if c is None else f"{c['speedup']['median']:.2f}" for c in cells),
                f"{sorted(stock)[len(stock) // 2]:.2f}" if stock else "",
            ])  # fmt: skip
        what = "1 token (decoding)" if tokens == 1 else f"{tokens} tokens (a prompt)"
        parts.append(
            f"speed over onnxruntime's dense float32 product, {what}, by zeros:\n"
            + display.table(lines, right=range(2, len(sparsities) + 3))
        )
    parts.append(f"  kept in {table['file']}")
    return "\n\n".join(parts)
