"""A page with a picture of what `bench` measured: one HTML file, nothing loaded from elsewhere."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from elsa_compile.runtime.display import benchmark
from elsa_compile.runtime.errors import UserInputError

_WIDTH, _LABEL, _ROW, _BAR = 760, 150, 46, 15
_STYLE = """
:root { color-scheme: light dark; --one: #2563eb; --two: #9ca3af; --line: #111; }
@media (prefers-color-scheme: dark) { :root { --one: #60a5fa; --two: #6b7280; --line: #eee; } }
body { font: 14px system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
svg { width: 100%; height: auto; } text { font: 12px system-ui, sans-serif; fill: currentColor; }
.model { fill: var(--one); } .against { fill: var(--two); } .range { stroke: var(--line); }
pre { overflow-x: auto; font-size: 12px; }
"""


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        result: of `bench`.
        path: where to.

    Raises:
        UserInputError: it cannot be written.
    """
    try:
        path.write_text(page(result), encoding="utf-8")
    except OSError as error:
        raise UserInputError(f"--html {path} cannot be written: {error.strerror}") from None


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    title = f"Speed of {result['files']['model']['path']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{picture(result)}"
        f"<pre>{escape(benchmark(result))}</pre></html>\n"
    )


def picture(result: Mapping[str, Any]) -> str:
    """Bars of the medians, a line from the slowest to the fastest repetition on each, as SVG.

    Each workload has a scale of its own: prefill is many times as fast as decoding.
    """
    names = list(result["files"])
    entries = result["results"]
    legend = "".join(
        f'<rect class="{name}" x="{_LABEL}" y="{6 + 18 * i}" width="12" height="12"/>'
        f'<text x="{_LABEL + 18}" y="{16 + 18 * i}">{escape(result["files"][name]["path"])}</text>'
        for i, name in enumerate(names)
    )
    top = 18 * len(names) + 14
    rows = "".join(_row(entry, names, top + _ROW * i) for i, entry in enumerate(entries))
    height = top + _ROW * len(entries)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="speed by workload">'
        f"{legend}{rows}</svg>"
    )


def _row(entry: Mapping[str, Any], names: list[str], top: int) -> str:
    """One workload: its name, a bar for each file, the ratio."""
    most = max(entry[name]["per_s"]["max"] for name in names)
    room = _WIDTH - _LABEL - 150
    made = [f'<text x="0" y="{top + 14}">{escape(entry["workload"])}</text>']
    if "speedup" in entry:
        made.append(f'<text x="0" y="{top + 30}">{entry["speedup"]["median"]:.2f}x</text>')
    for index, name in enumerate(names):
        speed = entry[name]["per_s"]
        y = top + index * (_BAR + 3)
        low, middle, high = (_LABEL + room * speed[k] / most for k in ("min", "median", "max"))
        across = y + _BAR / 2
        made.append(
            f'<rect class="{name}" x="{_LABEL}" y="{y}" width="{middle - _LABEL:.1f}" '
            f'height="{_BAR}"/><line class="range" x1="{low:.1f}" x2="{high:.1f}" '
            f'y1="{across}" y2="{across}"/><text x="{high + 6:.1f}" y="{y + 12}">'
            f"{speed['median']:,.1f} {escape(entry['unit'])}</text>"
        )
    return "".join(made)
