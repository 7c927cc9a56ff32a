"""Results of elsa-run as text for people; each function takes what --json would print."""

from collections.abc import Mapping, Sequence
from typing import Any

_MARKS = {True: "ok", False: "FAIL", None: "-"}


def size(count: float | None) -> str:
    """Bytes for people: "3.9 MiB"; "?" when unknown."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as aligned columns; the columns in `right` are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def verification(result: Mapping[str, Any]) -> str:
    """The checks of `elsa-run verify`, and how the weights are stored."""
    layers = f", {result['layers']} layers" if result["layers"] else ""
    total = result["file_bytes"] + result["external_bytes"]
    parts = [f"{result['model']}: {result['kind']}{layers}, {size(total)}"]
    if result["weights"]:
        rows = [["stored as", "weights", "elements", "zeros", "in file", "dense"]]
        rows += [
            [
                form,
                str(row["weights"]),
                f"{row['elements']:,}",
                f"{row['zeros'] / max(row['elements'], 1):.1%}",
                size(row["stored_bytes"]),
                size(row["dense_bytes"]),
            ]
            for form, row in result["weights"].items()
        ]
        parts.append(table(rows, right=range(1, 6)))
    checks = [[_MARKS[c["ok"]], c["name"], c["detail"]] for c in result["checks"]]
    parts.append(table(checks))
    passed = sum(c["ok"] is True for c in result["checks"])
    skipped = sum(c["ok"] is None for c in result["checks"])
    said = f"{passed} checks passed" if result["ok"] else "verification failed"
    parts.append(said + (f", {skipped} did not apply" if skipped else ""))
    return "\n\n".join(parts)


def evaluation(result: Mapping[str, Any]) -> str:
    """Perplexity and how it was measured."""
    bos = "no BOS" if result["bos"] is None else f"BOS {result['bos']} in each window"
    speed = result["tokens"] / max(result["seconds"], 1e-9)
    return "\n".join(
        [
            f"perplexity {result['perplexity']:.4f}   ({result['model']})",
            f"  {result['windows']} windows of {result['window']} tokens, {bos}, {result['data']}",
            f"  mean NLL {result['nll']:.6f} nats over {result['tokens']:,} predicted tokens",
            f"  {result['seconds']:.1f} s on {result['provider']}, {speed:,.0f} tokens/s",
            f"  protocol: {result['protocol']}",
        ]
    )


def generation(result: Mapping[str, Any]) -> str:
    """One line about a generated text; the text itself was already streamed."""
    speed = result["decode_tokens_per_s"]
    said = f", {speed:,.1f} tokens/s after the first" if speed else ""
    return (
        f"[{result['prompt_tokens']} prompt tokens, {len(result['ids'])} new ({result['stop']}), "
        f"first after {result['prefill_s'] * 1000:.0f} ms{said}]"
    )


def benchmark(result: Mapping[str, Any]) -> str:
    """Sizes and memory, then speeds with their ranges, then what may be concluded."""
    files = result["files"]
    rows = [["file", "on disk", "load", "memory after load", "peak"]]
    rows += [
        [
            file["path"],
            size(file["stored_bytes"]),
            f"{file['load_s']:.2f} s",
            "+" + size(file["growth_bytes"]),
            size(file["peak_rss_bytes"]),
        ]
        for file in files.values()
    ]
    parts = [table(rows, right=range(1, 5)), *_agreement(result)]
    head = ["workload", "median", "min .. max", "unit"]
    if "against" in files:
        head = ["workload", "model", "min .. max", "against", "min .. max", "unit", "ratio"]
    lines = [head]
    for entry in result["results"]:
        row = [entry["workload"]]
        for name in files:
            speed = entry[name]["per_s"]
            row += [_number(speed["median"]), f"{_number(speed['min'])} .. {_number(speed['max'])}"]
        row.append(entry["unit"])
        if "speedup" in entry:
            ratio = entry["speedup"]
            row.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} .. {ratio['max']:.2f})")
        lines.append(row)
    parts.append(table(lines, right=range(1, len(head) - (2 if "against" in files else 1))))
    judged = [entry for entry in result["results"] if "speedup" in entry]
    said = [f"  {entry['workload']}: {entry['speedup']['verdict']}" for entry in judged]
    if any(entry["workload"].startswith("prefill") for entry in result["results"]):
        said.append(f"  prefill gives the logits of the {_logits(result)}")
    if said:
        parts.append("\n".join(said))
    parts += _prediction(result.get("prediction"))
    parts += _layer_tables(result.get("layers") or {}, result.get("read_gb_per_s"))
    parts.append(_circumstances(result))
    return "\n\n".join(parts)


def _logits(result: Mapping[str, Any]) -> str:
    """Which logits were computed, and why not fewer."""
    which = str(result.get("prefill_logits", "all positions"))
    both = len(result["files"]) > 1
    if which.startswith("last"):
        return f"{which} alone" + (", on both sides" if both else "")
    lacks = "a file has no input" if both else "the file has no input"
    return f"{which}{', on both sides' if both else ''}: {lacks} logits_to_keep"


def _prediction(found: Mapping[str, Any] | None) -> list[str]:
    """What the compiler predicted, beside what was measured."""
    if found is None:
        return []
    threads = f"{found['threads']} thread(s)" if found["threads"] else "all cores"
    said = (
        f"  predicted by allocate-budget: {found['speedup']:.2f}x over dense float32 in decoding "
        f"at {found['context']}, {threads}; "
    )
    if found["measured"] is None:
        return [f"{said}not measured: {found['why']}"]
    return [f"{said}measured {found['measured']:.2f}x ({found['off']:+.0%})"]


def _layer_tables(
    layers: Mapping[str, Any], read_gb_per_s: float | None, most: int = 20
) -> list[str]:
    """The slowest nodes of each workload; roofline: GB/s over what memory is read at."""
    parts = []
    for side, tables in layers.items():
        for workload, rows in tables.items():
            lines = [["node", "operator", "kernel", "time", "weights", "GB/s", "roofline", "share"]]
            for row in rows[:most]:
                speed = row["gb_per_s"]
                lines.append([
                    row["node"][-40:], row["op"][:24], row["kernel"],
                    f"{row['seconds'] * 1e6:,.0f} us",
                    size(row["weight_bytes"]) if row["weight_bytes"] else "-",
                    f"{speed:.1f}" if speed else "-",
                    f"{speed / read_gb_per_s:.0%}" if speed and read_gb_per_s else "-",
                    f"{row['share']:.1%}",
                ])  # fmt: skip
            rest = sum(row["share"] for row in rows[most:])
            said = f"\n  and {len(rows) - most} more, {rest:.1%}" if len(rows) > most else ""
            parts.append(f"{side}, {workload}:\n{table(lines, right=(3, 4, 5, 6, 7))}{said}")
    if parts and read_gb_per_s:
        parts.append(
            f"  roofline: of the {read_gb_per_s:.1f} GB/s at which memory is read here; weights "
            "that stay in the caches can be faster"
        )
    return parts


def _agreement(result: Mapping[str, Any]) -> list[str]:
    """How near the two are, and whose kernels ran."""
    near, said = result.get("agreement"), []
    for file in result["files"].values():
        about = file["kernels"]
        whose = f"{about['products']} products on sparse kernels" if about["ours"] else "stock"
        if about["why"]:
            whose += f" (no sparse kernels here: {about['why']})"
        said.append(f"  {file['path']}: {whose}")
    if near:
        said.append(
            f"  scores differ by {near['rms']:.1e} (root mean square, relative); "
            f"{near['same_top']:.0%} of the positions have the same best entry"
        )
    return ["\n".join(said)]


def _circumstances(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = "all" if result["threads"] is None else str(result["threads"])
    return (
        f"  {machine['cpu']}, {machine['cores']} cores; {result['provider']}, threads: {threads}, "
        f"{result.get('clock', 'wall')} time; "
        f"onnxruntime {versions['onnxruntime']}; {result['warmup']} warm-up and "
        f"{result['repetitions']} timed repetitions"
        + (", files in turns" if "against" in result["files"] else "")
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
