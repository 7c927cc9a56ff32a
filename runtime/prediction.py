"""The decoding speed that the compiler predicted for a model, against the one that was measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.text import read_json

_REPORT = "elsa_report.json"
_NAMES = ("predicted_decode_speedup", "decode_context", "decode_threads")


def prediction_of(folder: Path) -> dict[str, Any] | None:
    """What allocate-budget wrote into the report beside a model: speedup, context, threads.

    None where no latency was asked for, or the report is unreadable: it is no part of the model.
    """
    try:
        passes = read_json(folder / _REPORT).get("passes")
    except UserInputError:
        return None
    for entry in reversed(passes if isinstance(passes, list) else []):
        counts = entry.get("counts") if isinstance(entry, dict) else None
        if not isinstance(counts, dict):
            continue
        found: list[Any] = [counts.get(name) for name in _NAMES]
        fine = all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in found)
        if fine and found[0] > 0:
            speedup, context, threads = found
            return {
                "speedup": float(speedup),
                "context": int(context),
                "threads": int(threads) or None,
            }
    return None


def compare_prediction(
    predicted: Mapping[str, Any] | None,
    results: Sequence[Mapping[str, Any]],
    threads: int | None,
    quantised: bool,
) -> dict[str, Any] | None:
    """The prediction with what was measured beside it.

    Args:
        predicted: of `prediction_of`.
        results: of `bench`.
        threads: of the sessions.
        quantised: the reference multiplies whole numbers, so it is not the dense float32 model.

    Returns:
        The prediction and: measured (the ratio of the workload it is about, None when that was not
        measured), off (measured / predicted - 1), why (measured is None); or None.
    """
    if predicted is None:
        return None
    name = f"decode at {predicted['context']}"
    ratio = next((r["speedup"] for r in results if r["workload"] == name and "speedup" in r), None)
    why = None
    if quantised:
        why = "the reference is quantised; compare with --against stock-fp32"
    elif threads != predicted["threads"]:
        wanted = predicted["threads"]
        why = (
            f"it is for {wanted or 'all'} threads; give --threads {wanted}"
            if wanted
            else ("it is for all cores; leave --threads out")
        )
    elif ratio is None:
        why = f"give --against stock-fp32 --context {predicted['context']} to check it"
    measured = None if why or ratio is None else float(ratio["median"])
    off = None if measured is None else measured / predicted["speedup"] - 1
    return {**predicted, "measured": measured, "off": off, "why": why}
