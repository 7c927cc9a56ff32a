"""Pictures of the report that need more than a row of bars: curves over steps, maps as PNG."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

Curve = Sequence[Sequence[float]]  # (step, value)

# Curves that belong in one plot: title, curve names, logarithmic?
_GROUPS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss", ("loss", "validation", "validation_projected"), False),
    ("residuals", ("primal", "dual"), True),
    ("share of mask entries that changed", ("churn",), True),
    ("penalty", ("penalty",), False),
    ("sparsity of the projection", ("sparsity",), False),
    ("learning rate", ("lr",), False),
)
_COLOURS = ("var(--one)", "var(--two)", "var(--good)")
_W, _H, _LEFT, _TOP, _BOTTOM = 470, 230, 58, 30, 24


def curve_plots(curves: Mapping[str, Curve]) -> str:
    """One SVG for each group of curves that is there."""
    known = {name for _, names, _ in _GROUPS for name in names}
    groups = [*_GROUPS, *((name, (name,), False) for name in curves if name not in known)]
    plots = []
    for title, names, logarithmic in groups:
        held = {name: _finite(curves[name], logarithmic) for name in names if name in curves}
        held = {name: points for name, points in held.items() if len(points) > 1}
        if held:
            plots.append(line_plot(title, held, logarithmic))
    return f'<div class="maps">{"".join(plots)}</div>'


def _finite(curve: Curve, logarithmic: bool) -> list[tuple[float, float]]:
    found = [(float(point[0]), float(point[1])) for point in curve]
    return [(x, y) for x, y in found if math.isfinite(y) and (y > 0 or not logarithmic)]


def line_plot(
    title: str,
    held: Mapping[str, Sequence[tuple[float, float]]],
    logarithmic: bool,
    unit: str = "step",
) -> str:
    """One SVG with a line for each name, in one of three colours and two dashes, and a legend.

    Args:
        title: of the plot.
        held: (x, y) points by name, x from 0.
        logarithmic: whether the vertical axis, which spans the values, is.
        unit: of x, written at its last value.
    """
    scale = math.log10 if logarithmic else float
    values = [scale(y) for points in held.values() for _, y in points]
    last = max(x for points in held.values() for x, _ in points) or 1.0
    top = _TOP + 12 * ((len(held) - 1) // 3)  # the legend needs a row for three names
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0

    def place(x: float, y: float) -> str:
        across = _LEFT + (_W - _LEFT - 8) * x / last
        up = top + (_H - top - _BOTTOM) * (1 - (scale(y) - low) / (high - low))
        return f"{across:.1f},{up:.1f}"

    shapes = [f'<text x="4" y="12">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        level = low + share * (high - low)
        shown = 10**level if logarithmic else level
        y = top + (_H - top - _BOTTOM) * (1 - share)
        shapes.append(f'<line class="axis" x1="{_LEFT}" x2="{_W - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{shown:.3g}</text>')
    for index, (name, points) in enumerate(held.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = " ".join(place(x, y) for x, y in points)
        dash = f";stroke-dasharray:{3 * (index // len(_COLOURS))}" if index >= 3 else ""
        style = f"stroke:{colour}{dash}"
        shapes.append(f'<polyline points="{line}" fill="none" style="{style}"/>')
        if len(held) > 1:
            x, y = _LEFT + 130 * (index % 3), 20 + 12 * (index // 3)
            label = escape(name.replace("_", ", "))
            shapes.append(f'<line x1="{x}" x2="{x + 14}" y1="{y}" y2="{y}" style="{style}"/>')
            shapes.append(f'<text x="{x + 18}" y="{y + 4}">{label}</text>')
    shapes.append(f'<text x="{_W - 8}" y="{_H - 6}" text-anchor="end">{unit} {last:,.4g}</text>')
    return (
        f'<svg viewBox="0 0 {_W} {_H}" width="{_W}" height="{_H}" role="img" '
        f'aria-label="{escape(title, quote=True)} over steps">{"".join(shapes)}</svg>'
    )


def grid_png(grid: Sequence[Sequence[float]], rgb: tuple[int, int, int]) -> str:
    """A data URI of a PNG: one pixel a cell, one colour, opacity from the value in [0, 1]."""
    rows = b"".join(
        b"\0" + b"".join(bytes((*rgb, round(255 * min(max(v, 0.0), 1.0)))) for v in line)
        for line in grid
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", len(grid[0]), len(grid), 8, 6, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
