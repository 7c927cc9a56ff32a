"""What `elsa-run explain` prints for people, from what it prints as JSON."""

from collections.abc import Mapping
from textwrap import fill
from typing import Any

from elsa_compile.runtime.display import size, table

_NAME = 48  # characters; the end tells layers apart, so the middle goes


def explanation(result: Mapping[str, Any], most: int | None) -> str:
    """A table of weights, what holds for all together, and the reasons.

    Args:
        result: of `explain`.
        most: weights to show, the largest first; None for all.
    """
    products = result["products"]
    weights = result["weights"]
    measured = result["measured"]
    parts = [f"{result['model']}: {result['kind']}, {size(result['file_bytes'])}"]
    if weights:
        shown = weights[:most]
        head = ["weight", "role", "shape", "zeros", "form", "in file", "kernel", "gain"]
        rows = [_row(weight) for weight in shown]
        if measured is not None:
            head.append("measured")
            rows = [[*row, _gain(w["measured_gain"])] for row, w in zip(rows, shown, strict=True)]
        parts.append(table([head, *rows], right=(3, 5, 7, 8)))
        if len(shown) < len(weights):
            parts.append(f"  and {len(weights) - len(shown)} smaller ones (--all)")
    parts.append(
        f"matrices: {products['matrices']}, {products['sparsity']:.1%} of {products['elements']:,} "
        f"entries zero; expected decode gain over the same values dense: "
        f"{products['expected_gain']:.1f}x (a table of one machine; --measure and elsa-run bench "
        "measure)"
    )
    if measured is not None:
        parts.append(
            f"measured with our kernels over stock onnxruntime, {measured['workload']}, threads: "
            f"{measured['threads'] or 'all'}: {measured['gain']:.2f}x over all nodes of the graph"
        )
    lines = [
        fill(each["sentence"], 98, initial_indent="  * ", subsequent_indent="    ")
        for each in result["reasons"]
    ]
    parts.append("\n".join(["why it is not faster, the main reason first:", *lines]))
    parts.append(_forms(result))
    return "\n\n".join(parts)


def _forms(result: Mapping[str, Any]) -> str:
    """Sizes of all forms, and what runs them."""
    rows = [["form of its weights", "bytes", "runs on", "speed"]]
    for each in result["forms"]:
        mark = " (this file)" if each["now"] else ""
        rows.append([each["form"] + mark, size(each["bytes"]), each["runs"], each["speed"]])
    said = [table(rows, right=(1,))]
    said += [f"  {each['form']}: {each['how']}" for each in result["forms"][:-1]]
    if result["decode_bytes"]:
        said.append(
            f"  stock onnxruntime needs about {size(result['decode_bytes'])} while it decodes the "
            "packed weights at load; elsa-run unpack gives a file that needs less"
        )
    return "\n".join(said)


def _row(weight: Mapping[str, Any]) -> list[str]:
    zeros, gain = weight["zeros"], weight["expected_gain"]
    return [
        _cut(weight["name"]),
        weight["role"],
        " x ".join(map(str, weight["shape"])),
        "?" if zeros is None else f"{weight['sparsity']:.1%}",
        weight["form"],
        size(weight["stored_bytes"]),
        weight["kernel"] or "-",
        f"{gain:.1f}x" if gain > 1 else "-",
    ]


def _gain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _cut(name: str) -> str:
    safe = "".join(c if c.isprintable() else "?" for c in name)
    half = _NAME // 2
    return safe if len(safe) <= _NAME else f"{safe[: half - 2]}...{safe[-half + 1 :]}"
