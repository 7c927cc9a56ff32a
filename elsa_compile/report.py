"""What a compilation found: as data, as a table, and in honest words.

`Report` is plain data (elsa_report.json, whose "probe" lets `elsa-run verify` repeat the check);
`honest_sentences` says nothing that its numbers do not; report_html draws it.
"""

import json
import math
import os
import platform
import resource
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elsa_compile.errors import UserInputError
from elsa_compile.onnx_merge import split_records
from elsa_compile.program import Program, Weight
from elsa_compile.recipe import Recipe
from elsa_compile.runtime import forms as forms_of
from elsa_compile.weight_store import StorageRecord
from elsa_compile.write_onnx import WriteResult

SCHEMA_VERSION = 1
JSON_FILE = "elsa_report.json"
HTML_FILE = "elsa_report.html"
_MAP_CELLS = 48  # of a zero map, at most, in each direction
_WIDTH = 96  # columns of the table
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Report:
    """One compilation.

    Attributes:
        schema_version: 1.
        model: source, kind, architecture, parameters.
        output: name of the .onnx file.
        recipe: the resolved passes with all options.
        passes: name, options, seconds, changed, counts, notes, warnings of each run.
        accuracy: metric, data, protocol, window, windows, tokens, bos, dense, compiled,
            onnxruntime and, for quantised weights, onnxruntime_exact: without int8 activations;
            compiled_rounded, when they are asked for: with rounded activations, simulated in torch;
            None when nothing was measured.
        sparsity: fraction of zeros over the pruned weights, over all prunable ones, over the model.
        weights: one row a weight matrix; see `_weight_row`.
        bytes: model, external, total, dense_total, bitmap_total, by_form, merged (initializers
            that hold several weights), side_by_side (all forms that the weights could have, what
            runs them and how to deploy them).
        dtype: how weights are stored.
        verification: the checks of the written file.
        probe: reference answers for `elsa-run verify`.
        memory: peak_rss_bytes of the compiling process.
        seconds: of each stage.
        environment: versions and machine.
        warnings: of all passes.
    """

    schema_version: int = SCHEMA_VERSION
    model: dict[str, Any]
    output: str
    recipe: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    accuracy: dict[str, Any] | None
    sparsity: dict[str, float]
    weights: list[dict[str, Any]]
    bytes: dict[str, Any]
    dtype: str
    verification: dict[str, Any] | None
    probe: dict[str, Any] | None
    memory: dict[str, int]
    seconds: dict[str, float]
    environment: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Valid JSON: numbers that are not finite are the texts "inf", "-inf" and "nan"."""
        return json.dumps(_to_plain(asdict(self)), allow_nan=False, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            UserInputError: no JSON, another schema, missing or unknown keys.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserInputError(f"{JSON_FILE} is not valid JSON: {error}") from None
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            found = content.get("schema_version") if isinstance(content, dict) else None
            raise UserInputError(
                f"{JSON_FILE} has schema {found!r}, this release reads {SCHEMA_VERSION}"
            )
        known = {spec.name for spec in fields(Report)}
        if set(content) != known:
            odd = sorted(set(content) ^ known)[0]
            raise UserInputError(f"{JSON_FILE} is damaged: the key {odd!r} is missing or unknown")
        accuracy = content["accuracy"]
        if isinstance(accuracy, dict):
            for key, value in accuracy.items():
                # What `to_json` writes as text.
                if key.startswith(("dense", "compiled", "onnxruntime")):
                    accuracy[key] = float(value)
        return Report(**content)


def make_report(
    program: Program,
    recipe: Recipe,
    written: WriteResult,
    *,
    output: str,
    accuracy: Mapping[str, Any] | None = None,
    verification: Mapping[str, Any] | None = None,
    probe: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    warnings: Iterable[str] = (),
    dtype: str = "fp32",
) -> Report:
    """Gather everything about a compilation.

    Args:
        program: after all passes.
        recipe: resolved.
        written: what the export wrote.
        output: name of the .onnx file.
        accuracy: see `Report`.
        verification: see `Report`.
        probe: see `Report`.
        seconds: of each stage.
        warnings: sentences.
        dtype: how weights are stored.
    """
    sizes = {name: weight.parameter.numel() for name, weight in program.weights.items()}
    records = split_records(written.records, written.merged, sizes)
    matrices = [w for w in program.weights.values() if w.kind != "other"]
    config = program.config or {}
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    return Report(
        model={
            "source": program.source,
            "kind": program.kind,
            "architecture": architecture,
            "parameters": program.parameters(),
        },
        output=output,
        recipe=recipe.entries(),
        passes=[
            {"name": r.name, "options": r.options, "seconds": r.seconds, **asdict(r.stats)}
            for r in program.history
        ],
        accuracy=None if accuracy is None else dict(accuracy),
        sparsity=_sparsity(program),
        weights=[_weight_row(w, program, records) for w in matrices],
        bytes=_bytes(written),
        dtype=dtype,
        verification=None if verification is None else dict(verification),
        probe=None if probe is None else dict(probe),
        memory={"peak_rss_bytes": _peak_rss_bytes()},
        seconds=dict(seconds or {}),
        environment=_environment(),
        warnings=list(warnings),
    )


def _sparsity(program: Program) -> dict[str, float]:
    """Zeros over elements, counted."""

    def share(weights: Iterable[Weight]) -> float:
        zeros = size = 0
        for weight in weights:
            zeros += int((weight.parameter == 0).sum())
            size += weight.parameter.numel()
        return zeros / size if size else 0.0

    return {
        "pruned": share(weight for weight, _ in program.planned()),
        "prunable": share(program.prunable.values()),
        "model": share(program.weights.values()),
    }


def _weight_row(
    weight: Weight, program: Program, records: Mapping[str, StorageRecord]
) -> dict[str, Any]:
    """One row of `Report.weights`.

    shape is (N, K); bytes are those of the stored form, scales of quantised weights included, the
    other *_bytes of the other forms: dense and float, if it is quantised; of a part of a merged
    matrix they are its share by size; dtype is that of the
    entries in the file. skipped says why a weight was not pruned, reason why the form was chosen.
    """
    plan = program.plans.get(weight.name)
    grid = program.grids().get(weight.name)
    record = records.get(weight.name)
    scales = [r for n, r in records.items() if n.startswith(f"{weight.name}.scale")]
    scale_bytes = sum(r.stored_bytes for r in scales if r.float_bytes == 0)
    matrix = weight.matrix()
    sparsity = float((matrix == 0).float().mean())
    planned = plan.sparsity if plan is not None and plan.skipped is None else 0.0
    skipped = plan.skipped if plan is not None else "embedding" if not weight.prunable else None
    return {
        "name": weight.name,
        "shape": list(weight.matrix_shape),
        "type": weight.type_name or weight.kind,
        "pattern": str(plan.pattern) if plan is not None and plan.skipped is None else None,
        "planned": planned,
        "sparsity": sparsity,
        "relative_error": None if plan is None else plan.relative_error,
        "form": "absent" if record is None else record.form,
        "reason": None if record is None else record.reason,
        "dtype": None if record is None else record.dtype,
        "group_size": None if grid is None else grid.group_size(weight.matrix_shape[1]),
        "bytes": 0 if record is None else record.stored_bytes + scale_bytes,
        "scale_bytes": scale_bytes,
        "dense_bytes": 0 if record is None else _float_bytes(record),
        "coo_bytes": 0 if record is None else min(record.coo_varint_bytes, record.coo_raw_bytes),
        "bitmap_bytes": 0 if record is None else record.bitmap_bytes,
        "skipped": skipped,
        "zero_map": zero_map(matrix) if sparsity >= 0.01 else None,
    }


def zero_map(matrix: Tensor) -> list[list[float]]:
    """Fraction of zeros in up to 48 x 48 cells of a matrix (N, K), to three digits.

    >>> zero_map(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    [[1.0, 0.0], [1.0, 1.0]]
    """
    zeros = (matrix == 0).float()[None, None]
    cells = (min(_MAP_CELLS, matrix.shape[0]), min(_MAP_CELLS, matrix.shape[1]))
    pooled = torch.nn.functional.adaptive_avg_pool2d(zeros, cells)[0, 0]
    return [[round(value, 3) for value in row] for row in pooled.tolist()]


def _float_bytes(record: StorageRecord) -> int:
    """Dense and not quantised."""
    return record.dense_bytes if record.float_bytes is None else record.float_bytes


def _form(record: StorageRecord) -> str:
    """dense, coo (varint), int8 dense, scales, ..."""
    form = f"{record.form} ({record.index_encoding})" if record.index_encoding else record.form
    if record.float_bytes is None:
        return form
    return f"{record.dtype} {form}" if record.float_bytes else "scales"


def _bytes(written: WriteResult) -> dict[str, Any]:
    """Sizes in bytes; by_form counts weights, stored and dense bytes of each storage form.

    Dense means neither sparse nor quantised; scales are nothing there.
    """
    forms: dict[str, dict[str, int]] = {}
    saved = bitmap_saved = 0
    for record in written.records:
        row = forms.setdefault(_form(record), {"weights": 0, "stored": 0, "dense": 0})
        row["weights"] += 1
        row["stored"] += record.stored_bytes
        row["dense"] += _float_bytes(record)
        saved += _float_bytes(record) - record.stored_bytes
        smallest = min(record.dense_bytes, record.stored_bytes, record.bitmap_bytes)
        bitmap_saved += _float_bytes(record) - smallest
    total = written.model_bytes + written.data_bytes
    return {
        "model": written.model_bytes,
        "external": written.data_bytes,
        "total": total,
        "dense_total": total + saved,
        "bitmap_total": total + saved - bitmap_saved,
        "by_form": forms,
        "side_by_side": _side_by_side(written),
        "merged": {name: list(parts) for name, parts in written.merged.items()},
    }


def _side_by_side(written: WriteResult) -> list[dict[str, Any]]:
    """The weights in every form they could have: `runtime.forms.forms_table`."""
    entries, held = [], dict.fromkeys(forms_of.DEPLOY, 0)
    for record in written.records:
        size, bits = math.prod(record.shape), forms_of.dtype_bits(record.dtype)
        entries.append(forms_of.Entry(size, record.nonzeros, (*record.shape, 1)[0], bits))
        packed_int8 = record.form == "packed" and record.dtype == "int8"
        held["packed int8" if packed_int8 else record.form] += size
    sizes = forms_of.form_bytes(entries)
    sizes["dense"] = sum(_float_bytes(record) for record in written.records)
    most = max(held, key=lambda form: held[form])
    return forms_of.forms_table(sizes, most, forms_of.archive_bytes(written.paths))


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _environment() -> dict[str, str]:
    """Versions and machine, without names of hosts or folders."""
    from elsa_compile import __version__

    found = {"elsa-compile": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    found["threads"] = str(torch.get_num_threads())
    return found


# --- In words -------------------------------------------------------------------------------


def honest_sentences(report: Report) -> list[str]:
    """What is better than before, what is not, and what was not measured."""
    sizes, accuracy = report.bytes, report.accuracy
    said = []
    if accuracy is None and report.model["kind"] == "decoder":
        said.append("Accuracy was not measured: no text was given with --eval-data.")
    elif accuracy is None:
        said.append(
            "Accuracy was not measured: the file computes what the pruned torch model does, but "
            "what pruning cost must be measured on the model's own task."
        )
    else:
        dense, compiled = accuracy["dense"], accuracy["compiled"]
        change = compiled / dense - 1 if math.isfinite(compiled) and dense else math.inf
        how = f"{change:+.1%}" if math.isfinite(change) else "no longer finite"
        said.append(
            f"Perplexity went from {number(dense)} to {number(compiled)} ({how}) on "
            f"{accuracy['tokens']:,} tokens of {accuracy['data']} in windows of "
            f"{accuracy['window']}; onnxruntime gives {number(accuracy['onnxruntime'])}."
        )
        if change > 0.5:
            said.append(
                "That is a heavy loss: use a lower sparsity or a stronger pruning pass, or train."
            )
    share = report.sparsity["model"]
    of_pruned = f"{report.sparsity['pruned']:.1%} of the pruned weights and "
    said.append(
        f"{of_pruned if any(row['planned'] for row in report.weights) else ''}{share:.1%} of all "
        "parameters are zero."
    )
    said += _about_removed(report)
    ratio = sizes["total"] / max(sizes["dense_total"], 1)
    if ratio < 0.995:
        said.append(
            f"The file has {size_text(sizes['total'])}, {ratio:.2f} of the "
            f"{size_text(sizes['dense_total'])} it would have with every weight dense."
        )
    elif ratio <= 1.005:
        said.append("The file is not smaller than a dense one.")
    else:
        said.append(f"The file is {ratio:.2f} times as large as with every weight dense.")
    said += _about_grids(report) + _about_forms(report)
    if sizes["merged"]:
        parts = sum(len(names) for names in sizes["merged"].values())
        said.append(
            f"{parts} layers are {len(sizes['merged'])} products: they read the same values."
        )
    speed = "Speed and memory in a stock onnxruntime are those of a dense model"
    if _quantised(report):
        speed += " of the same whole numbers"
    if any(row["form"] == "coo" for row in report.weights):
        speed += ": it expands sparse weights while loading"
    if ratio < 0.995:
        speed += ". What is gained is the size of the file, on disk and on the way"
    said.append(f"{speed}.")
    packed = [
        (math.prod(row["shape"]), forms_of.dtype_bits(row["dtype"]))
        for row in report.weights
        if row["form"] == "packed"
    ]
    if packed:
        said.append(
            f"Packed weights are decoded by functions in the file: stock onnxruntime needs about "
            f"{size_text(forms_of.decode_bytes(packed))} for that while loading (elsa-run unpack "
            "gives a file that needs less); elsa-compile's kernels run them packed."
        )
    return said


def _quantised(report: Report) -> list[dict[str, Any]]:
    return [row for row in report.weights if row["dtype"] in ("int8", "int4")]


def _about_removed(report: Report) -> list[str]:
    removed = sum(row["counts"].get("parameters", 0) for row in report.passes)
    if not removed:
        return []
    return [
        f"{removed:,} parameters were taken out of the model, {size_text(4 * removed)} at 4 bytes "
        "each: it is a smaller dense one, and the sizes here are of what is left."
    ]


def _about_grids(report: Report) -> list[str]:
    rows = _quantised(report)
    if not rows:
        return []
    entries = sum(math.prod(row["shape"]) for row in rows)
    counts = {dtype: sum(row["dtype"] == dtype for row in rows) for dtype in ("int8", "int4")}
    kinds = " and ".join(f"{count} as {dtype}" for dtype, count in counts.items() if count)
    said = (
        f"Quantised: {kinds}, with scales {sum(row['bytes'] for row in rows) / entries:.2f} bytes "
        f"an entry instead of {sum(row['dense_bytes'] for row in rows) / entries:.2f}"
    )
    exact = (report.accuracy or {}).get("onnxruntime_exact")
    if exact is not None:
        said += (
            "; onnxruntime by default rounds the activations of their products to int8 as well, "
            f"and gives {number(float(exact))} without that"
        )
    simulated = (report.accuracy or {}).get("compiled_rounded")
    if simulated is not None:
        said += f"; rounded as in our kernels they give {number(simulated)} in torch"
    return [f"{said}."]


def _about_forms(report: Report) -> list[str]:
    reasons: dict[str, int] = {}
    for row in report.weights:
        if row["form"] == "dense" and row["planned"] > 0:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    said = []
    for reason, count in reasons.items():
        why = reason
        if reason.startswith("COO"):
            why = "at their sparsity the indices of the sparse form cost more than the zeros save"
        said.append(f"{count} pruned weights stay dense in the file: {why}.")
    large = [
        row
        for row in report.weights
        if row["form"] == "dense" and row["skipped"] and row["bytes"] > 0.1 * report.bytes["total"]
    ]
    for row in large:
        said.append(
            f"{row['name']} stays dense ({row['skipped']}) and is "
            f"{row['bytes'] / report.bytes['total']:.0%} of the file."
        )
    return said


def render_table(report: Report) -> str:
    """The end of a run on a terminal, at most 96 columns wide."""
    sizes = report.bytes
    rows: list[tuple[str, str]] = []
    if report.accuracy is not None:
        found = report.accuracy
        rows.append(
            (
                "perplexity",
                f"dense {number(found['dense'])}, compiled {number(found['compiled'])}, "
                f"onnxruntime {number(found['onnxruntime'])}",
            )
        )
    zeros = report.sparsity
    rows.append(
        (
            "sparsity",
            f"pruned weights {zeros['pruned']:.4f}, prunable {zeros['prunable']:.4f}, "
            f"model {zeros['model']:.4f}",
        )
    )
    for form, row in sizes["by_form"].items():
        rows.append(
            (
                f"stored {form}",
                f"{row['weights']} weights, {size_text(row['stored'])} for "
                f"{size_text(row['dense'])} dense",
            )
        )
    rows.append(
        (
            "file",
            f"{size_text(sizes['total'])}, dense it would be {size_text(sizes['dense_total'])} "
            f"(ratio {sizes['total'] / max(sizes['dense_total'], 1):.3f})",
        )
    )
    if report.verification is not None:
        checks = report.verification["checks"]
        passed = [check["name"] for check in checks if check["ok"]]
        rows.append(("verified", ", ".join(passed)))
    total = sum(report.seconds.values()) + sum(step["seconds"] for step in report.passes)
    rows.append(
        ("took", f"{total:.1f} s, peak memory {size_text(report.memory['peak_rss_bytes'])}")
    )
    label = max(len(name) for name, _ in rows) + 2
    lines = ["-" * _WIDTH]
    for name, text in rows:
        indent = " " * label
        wrapped = textwrap.wrap(text, _WIDTH - label)
        lines += [f"{name:{label}}{wrapped[0]}", *(indent + more for more in wrapped[1:])]
    lines.append("-" * _WIDTH)
    for sentence in [*honest_sentences(report), *(f"Warning: {w}" for w in report.warnings)]:
        lines += textwrap.wrap(sentence, _WIDTH)
    return "\n".join(lines)


def number(value: float) -> str:
    """A perplexity for people: 21.55, 1,234, inf."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}"


def size_text(count: float) -> str:
    """Bytes for people.

    >>> size_text(1616645)
    '1.54 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def write_report(report: Report, folder: Path) -> list[Path]:
    """elsa_report.json and elsa_report.html; the caller's staging folder makes them atomic."""
    from elsa_compile.report_html import render_html

    paths = [folder / JSON_FILE, folder / HTML_FILE]
    paths[0].write_text(report.to_json() + "\n", encoding="utf-8")
    paths[1].write_text(render_html(report), encoding="utf-8")
    return paths


def _to_plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    return value
