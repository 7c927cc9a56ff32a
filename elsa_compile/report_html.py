"""The report as one self-contained HTML file: plots as inline SVG, no scripts, light and dark."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from elsa_compile.report import Report, honest_sentences, number, size_text
from elsa_compile.report_plots import curve_plots, grid_png

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2230; --soft: #5a6375; --line: #d8dce4; --paper: #fff;
  --card: #f6f7f9; --one: #2f6fd0; --two: #d9822b; --good: #1f8a4c; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #343b48;
  --paper: #14171d; --card: #1c2028; --one: #6ea3f5; --two: #f0a85c; --good: #55c584;
  --bad: #f0796b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); } .figures { display: flex; flex-wrap: wrap; gap: .8rem;
  margin: 1.2rem 0; } .figure { background: var(--card); border-radius: .5rem; padding: .7rem 1rem;
  min-width: 10rem; } .figure b { display: block; font-size: 1.35rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--soft);
  font: 11px system-ui, sans-serif; } .one { fill: var(--one); } .two { fill: var(--two); }
.axis { stroke: var(--line); } .mark { stroke: var(--two); stroke-width: 2; }
.maps { display: flex; flex-wrap: wrap; gap: 1rem; } .maps figure { margin: 0; width: 10rem; }
figcaption { font-size: .72rem; overflow-wrap: anywhere; } polyline { stroke-width: 1.6; }
.ground { background: var(--card); image-rendering: pixelated; }
"""
_MAPS = 24
_MAP_COLOUR = (64, 122, 214)  # legible on the light and the dark ground
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 220, 64, 26


def render_html(report: Report) -> str:
    """The whole page; every text that comes from the model is escaped."""
    title = f"{report.model['source']} compiled to {report.output}"
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_subtitle(report))}</p></header>',
        _figures(report),
        "<h2>In short</h2><ul>",
        *(f"<li>{escape(sentence)}</li>" for sentence in honest_sentences(report)),
        *(f'<li class="bad">{escape(warning)}</li>' for warning in report.warnings),
        "</ul>",
        "<h2>Sparsity of each weight</h2>",
        _per_weight(
            report,
            "sparsity",
            lambda row: row["sparsity"],
            "fraction of zeros",
            1.0,
            lambda row: row["planned"] or None,
        ),
        '<p class="soft">Bars: measured. Lines: planned. In graph order.</p>',
        "<h2>Change of each weight</h2>",
        _per_weight(
            report, "change", lambda row: row["relative_error"] or 0.0, "‖W − W₀‖ / ‖W₀‖", None
        ),
        "<h2>Bytes by storage form</h2>",
        _forms(report),
        "<h2>Forms side by side, and what runs them</h2>",
        _side_by_side(report),
        "<h2>Where the zeros are</h2>",
        _maps(report),
        "<h2>Passes</h2>",
        _passes(report),
        *_curves(report),
        "<h2>Checks of the written file</h2>",
        _checks(report),
        "<h2>Weights</h2>",
        _weights(report),
        "<h2>Time and environment</h2>",
        _environment(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _subtitle(report: Report) -> str:
    model = report.model
    passes = ", ".join(step["name"] for step in report.passes)
    return (
        f"{model['architecture'] or model['kind']}, {model['parameters']:,} parameters; weights "
        f"stored as {report.dtype}; passes: {passes or 'none'}"
    )


def _figures(report: Report) -> str:
    sizes = report.bytes
    shown = [
        ("sparsity of pruned weights", f"{report.sparsity['pruned']:.1%}"),
        ("file", size_text(sizes["total"])),
        ("of the dense file", f"{sizes['total'] / max(sizes['dense_total'], 1):.2f}"),
    ]
    if report.accuracy is not None:
        shown.append(("perplexity, dense", number(report.accuracy["dense"])))
        shown.append(("perplexity, compiled", number(report.accuracy["compiled"])))
        shown.append(("perplexity, onnxruntime", number(report.accuracy["onnxruntime"])))
    cells = (
        f'<div class="figure"><b>{escape(value)}</b><span class="soft">{escape(name)}</span></div>'
        for name, value in shown
    )
    return f'<div class="figures">{"".join(cells)}</div>'


def _per_weight(
    report: Report,
    what: str,
    value: Callable[[dict[str, Any]], float],
    label: str,
    top: float | None,
    mark: Callable[[dict[str, Any]], float | None] = lambda row: None,
) -> str:
    """A bar for each prunable weight, in graph order."""
    rows = [row for row in report.weights if row["pattern"] is not None]
    if not rows:
        return '<p class="soft">No weight was pruned.</p>'
    highest = top or max((value(row) for row in rows), default=0.0) or 1.0
    plot_width, plot_height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 12
    step = plot_width / len(rows)
    shapes = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = 12 + plot_height * (1 - share)
        shapes.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        shapes.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * highest:.2g}</text>'
        )
    for index, row in enumerate(rows):
        found = value(row)
        height = plot_height * min(found / highest, 1.0)
        x, width = _LEFT + index * step, max(step * 0.8, 0.5)
        y = 12 + plot_height - height
        title = escape(f"{row['name']}: {found:.4f}")
        shapes.append(
            f'<rect class="one" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" '
            f'height="{height:.2f}"><title>{title}</title></rect>'
        )
        wanted = mark(row)
        if wanted is not None:
            level = 12 + plot_height * (1 - wanted / highest)
            shapes.append(
                f'<line class="mark" x1="{x:.2f}" x2="{x + width:.2f}" y1="{level:.2f}" '
                f'y2="{level:.2f}"/>'
            )
    ends = (escape(_short(rows[0]["name"])), escape(_short(rows[-1]["name"])))
    shapes.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{ends[0]}</text>')
    if len(rows) > 1:
        shapes.append(
            f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 8}" text-anchor="end">{ends[1]}</text>'
        )
    shapes.append(f'<text x="{_LEFT}" y="8">{escape(label)}</text>')
    return _svg(_WIDTH, _HEIGHT, f"{what} of {len(rows)} weights", shapes)


def _forms(report: Report) -> str:
    """Two bars for each storage form: stored, and what it would be dense."""
    rows = list(report.bytes["by_form"].items())
    highest = max((max(r["stored"], r["dense"]) for _, r in rows), default=1) or 1
    shapes, y = [], 4
    for form, row in rows:
        shapes.append(f'<text x="0" y="{y + 12}">{escape(form)}: {row["weights"]} weights</text>')
        for name, kind, count in (
            ("stored", "one", row["stored"]),
            ("dense", "two", row["dense"]),
        ):
            y += 18
            width = (_WIDTH - 260) * count / highest
            shapes.append(
                f'<rect class="{kind}" x="60" y="{y}" width="{max(width, 1):.1f}" height="14"/>'
            )
            shapes.append(f'<text x="54" y="{y + 11}" text-anchor="end">{name}</text>')
            shapes.append(f'<text x="{66 + width:.1f}" y="{y + 11}">{size_text(count)}</text>')
        y += 28
    return _svg(_WIDTH, y, "bytes by storage form", shapes)


def _side_by_side(report: Report) -> str:
    """A table of all forms the weights could have."""
    rows = []
    for each in report.bytes["side_by_side"]:
        form = each["form"] + (" (this file)" if each["now"] else "")
        rows.append((form, size_text(each["bytes"]), each["runs"], each["speed"], each["how"]))
    return _table(("form", "weights", "runs on", "speed", "how"), rows, numbers=(1,))


def _maps(report: Report) -> str:
    """Zero maps of the largest pruned weights, rows down, columns across."""
    rows = [row for row in report.weights if row["zero_map"] is not None]
    rows = sorted(rows, key=lambda row: -row["dense_bytes"])[:_MAPS]
    if not rows:
        return '<p class="soft">There are hardly any zeros.</p>'
    figures = []
    for row in rows:
        grid = row["zero_map"]
        flat = [value for line in grid for value in line]
        low, high = min(flat), max(flat)
        spread = high - low
        shades = [[(v - low) / spread if spread else v for v in line] for line in grid]
        label = escape(f"zeros of {row['name']}", quote=True)
        picture = (
            f'<img class="ground" width="160" height="160" alt="{label}" '
            f'src="{grid_png(shades, _MAP_COLOUR)}">'
        )
        caption = f"{row['name']}, cells {low:.2f} to {high:.2f} zero"
        figures.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    note = (
        f"The {len(rows)} largest of the pruned weights; output features down, inputs across; "
        "the darkest cell of a picture has its most zeros."
    )
    return f'<p class="soft">{note}</p><div class="maps">{"".join(figures)}</div>'


def _passes(report: Report) -> str:
    rows = [
        (
            step["name"],
            ", ".join(f"{key}={value}" for key, value in step["options"].items()) or "none",
            f"{step['changed']:,}",
            f"{step['seconds']:.1f}",
        )
        for step in report.passes
    ]
    return _table(("pass", "options", "changed", "seconds"), rows, numbers=(2, 3))


def _curves(report: Report) -> list[str]:
    """The course of each pass that trained."""
    parts = []
    for step in report.passes:
        if step.get("curves"):  # reports of older releases have none
            parts += [f"<h2>Course of {escape(step['name'])}</h2>", curve_plots(step["curves"])]
    return parts


def _checks(report: Report) -> str:
    if report.verification is None:
        return '<p class="bad">The file was not checked.</p>'
    words = {True: "passed", False: "FAILED", None: "does not apply"}
    rows = [
        (check["name"], words[check["ok"]], check["detail"])
        for check in report.verification["checks"]
    ]
    return _table(("check", "result", "detail"), rows)


def _weights(report: Report) -> str:
    rows = [
        (
            row["name"],
            " × ".join(map(str, row["shape"])),
            row["pattern"] or row["skipped"] or "",
            f"{row['planned']:.3f}",
            f"{row['sparsity']:.4f}",
            "" if row["relative_error"] is None else f"{row['relative_error']:.4f}",
            f"{row.get('dtype', '')} {row['form']}",
            f"{row['bytes']:,}",
            f"{row['dense_bytes']:,}",
        )
        for row in report.weights
    ]
    heads = (
        "weight",
        "N × K",
        "pattern",
        "planned",
        "sparsity",
        "change",
        "form",
        "bytes",
        "dense",
    )
    return _table(heads, rows, numbers=(3, 4, 5, 7, 8))


def _environment(report: Report) -> str:
    rows = [(name, f"{seconds:.1f} s") for name, seconds in report.seconds.items()]
    rows.append(("peak memory", size_text(report.memory["peak_rss_bytes"])))
    rows += list(report.environment.items())
    return _table(("what", "value"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=' + chr(34) + 'n' + chr(34) if i in numbers else ''}>"
            f"{escape(str(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="scroll"><table><thead>{line(heads, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _svg(width: int, height: int, label: str, shapes: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(shapes)}</svg>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:28]}...{name[-28:]}"
