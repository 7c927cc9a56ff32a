"""`elsa-run pack` and `elsa-run unpack`: arguments in, one call, its result out."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elsa_compile.runtime.command_line import print_json

_PACK = """\
Stores each weight of an ONNX file packed, one bit an entry and the values that are not zero, where
that is smaller. Any onnxruntime runs the result: the file brings the functions along that make the
weights dense while loading. elsa-compile's kernels run it packed. Values keep every bit.
"""
_PACK_EPILOG = """\
examples:
  elsa-run pack model.onnx -o packed/model.onnx
  elsa-run pack model.onnx -o packed.onnx --drop-negative-zeros
"""
_UNPACK = """\
The inverse of pack: dense weights, or sparse initializers where those are smaller, with every bit
as it was. For onnxruntimes with too little memory to decode at load, and for other tools.
"""
_UNPACK_EPILOG = """\
examples:
  elsa-run unpack packed/model.onnx -o dense/model.onnx
  elsa-run unpack packed/model.onnx -o sparse/model.onnx --form coo
"""

_MOST_FOLDED = 1 << 28  # entries: four bytes each for its position

Add = Callable[..., argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """Put both commands on the parser of `elsa-run`."""
    pack = add("pack", run_pack, "store weights packed", _PACK, _PACK_EPILOG)
    unpack = add("unpack", run_unpack, "the inverse of pack", _UNPACK, _UNPACK_EPILOG)
    for made in (pack, unpack):
        made.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
        made.add_argument(
            "--external",
            action="store_true",
            default=None,
            help="data in a file beside the model; default: beyond 2 GB",
        )
    pack.add_argument(
        "--drop-negative-zeros",
        action="store_true",
        help="store -0.0, which multiplying by a mask leaves, as 0.0",
    )
    unpack.add_argument("--form", choices=("dense", "coo"), default="dense", help="default: dense")


def run_pack(options: argparse.Namespace) -> int:
    """`elsa-run pack`."""
    from elsa_compile.runtime.pack_file import pack_file, summary

    result = pack_file(
        options.model,
        options.output,
        drop_negative_zeros=options.drop_negative_zeros,
        external=options.external,
        progress=_counter(),
    )
    if options.json:
        print_json(result)
        return 0
    print(_sizes(result))
    for form, row in summary(result["weights"]).items():
        print(
            f"  {form}: {row['weights']} weights, {row['before_bytes']:,} -> "
            f"{row['after_bytes']:,} bytes"
        )
    large = [each["name"] for each in result["weights"] if _folds_not(each)]
    if large:
        print(
            f"  {len(large)} of more than {_MOST_FOLDED:,} entries ({large[0]}): stock onnxruntime "
            "decodes them at each run unless the session option "
            "optimization.constant_folding_max_output_size_in_bytes is raised"
        )
    negative = sum(each["negative_zeros"] for each in result["weights"])
    if negative:
        print(f"  {negative:,} values are -0.0; --drop-negative-zeros would store them as zeros")
    return 0


def _folds_not(weight: Mapping[str, Any]) -> bool:
    """Whether onnxruntime's limit of 1 GiB for a folded result keeps it from decoding at load."""
    return weight["form"] == "packed" and bool(math.prod(weight["shape"]) > _MOST_FOLDED)


def run_unpack(options: argparse.Namespace) -> int:
    """`elsa-run unpack`."""
    from elsa_compile.runtime.unpack_file import unpack_file

    result = unpack_file(
        options.model,
        options.output,
        form=options.form,
        external=options.external,
        progress=_counter(),
    )
    if options.json:
        print_json(result)
    else:
        print(_sizes(result))
        print("  " + ", ".join(f"{count} {form}" for form, count in result["weights"].items()))
    return 0


def _sizes(result: Mapping[str, Any]) -> str:
    before, after = result["before_bytes"], result["after_bytes"]
    beside = f" ({result['data_bytes']:,} beside the model)" if result["data_bytes"] else ""
    return (
        f"{result['source']} -> {result['output']}: {before:,} -> {after:,} bytes, "
        f"{after / before:.3f} of it{beside}"
    )


def _counter() -> Callable[[int, int], None] | None:
    """A count on one line of a terminal; nothing when standard error is none."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\r" if done < total else "\r\033[K"
        print(f"weight {done} of {total}", end=end, file=sys.stderr, flush=True)

    return show
