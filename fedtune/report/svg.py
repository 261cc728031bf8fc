"""Line charts as inline SVG: no script, no font, no file; colours come from the page's CSS.

A chart is drawn twice, wide and narrow, and CSS shows the one that fits: text keeps its size on a
phone, which one scaled drawing cannot do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from fedtune.report import figures
from fedtune.report.curves import Curve
from fedtune.results.series import Values, last

__all__ = ["Shape", "line_chart", "nice_ticks", "printable", "spread_out"]

MARKERS = 40  # more points than this get no dots
LABEL_GAP = 18.0  # px between two end labels


def printable(value: object) -> str:
    """Text without control characters, which no document may hold."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "", f"{value}")


def esc(value: object) -> str:
    """Text for SVG."""
    return escape(printable(value))


@dataclass(frozen=True)
class Shape:
    """Size in px; `right` holds the end labels and is small where there are none."""

    width: int
    height: int
    right: int
    left: int = 46
    top: int = 14
    bottom: int = 42


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] px."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def line_chart(
    curves: Sequence[Curve],
    shape: Shape,
    *,
    x_title: str,
    y_text: Callable[[float], str],
    title: str,
    css: str = "",
    zero: bool = False,
    start: str = "",
) -> Markup:
    """One `<svg>`; `zero` puts y = 0 into view and rules it; `start` names the first value."""
    xs = [x for curve in curves for x in curve.x if x is not None]
    ys = [y for c in curves for y in (*c.y, *c.low, *c.high) if y is not None]
    if not xs or not ys:
        return Markup("")
    x_low, x_high = _limits(xs, 0.0)
    y_low, y_high = _limits([*ys, 0.0] if zero else ys, 0.06)
    x = Scale(x_low, x_high, shape.left, shape.width - shape.right)
    y = Scale(y_low, y_high, shape.height - shape.bottom, shape.top)
    parts = [
        _grid(x, y, shape, x_title, zero),
        *(_band(curve, x, y) for curve in curves),
        *(_line(curve, x, y) for curve in reversed(curves)),
        *(_dots(curve, x, y, y_text) for curve in reversed(curves)),
        _end_labels(curves, x, y, shape, y_text) if shape.right > 30 else "",
        _start_label(curves, x, y, y_text, start),
    ]
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {shape.width} {shape.height}" role="img" '
        f'aria-label="{esc(title)}">{"".join(parts)}</svg>'
    )


def nice_ticks(low: float, high: float, wanted: int, *, whole: bool = False) -> list[float]:
    """Round values in [low, high], about `wanted` of them; `whole` for counts.

    nice_ticks(2.42, 2.93, 5) -> [2.5, 2.6, 2.7, 2.8, 2.9]
    """
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.8)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart until neighbours are `gap` apart, order kept, inside [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = max(min(placed[i], limit), low)
        limit = placed[i] - gap
    result = [0.0] * len(wanted)
    for position, i in zip(placed, order, strict=True):
        result[i] = position
    return result


def _limits(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * margin or (abs(high) * 0.05 or 1.0) * (high == low)
    return low - pad, high + pad


def _grid(x: Scale, y: Scale, shape: Shape, x_title: str, zero: bool) -> str:
    floor = shape.height - shape.bottom
    y_ticks = nice_ticks(y.low, y.high, 4 if shape.height < 280 else 5)
    x_ticks = nice_ticks(x.low, x.high, 4 if x.end - x.start < 420 else 7, whole=True)
    parts = []
    for tick in y_ticks:
        kind = "zero" if zero and tick == 0 else "grid"
        at = y(tick)
        parts.append(f'<path class="{kind}" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">'
        )
        parts.append(f"{figures.tick(tick, y_ticks)}</text>")
    for tick in x_ticks:
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{floor + 18}" text-anchor="middle">')
        parts.append(f"{figures.compact(tick)}</text>")
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{shape.height - 6}" text-anchor="middle">'
    )
    parts.append(f"{esc(x_title)}</text>")
    return "".join(parts)


def _points(curve_x: Values, ys: Values, x: Scale, y: Scale) -> list[tuple[float, float] | None]:
    pairs = zip(curve_x, ys, strict=False)
    return [None if a is None or b is None else (x(a), y(b)) for a, b in pairs]


def _path(points: Iterable[tuple[float, float] | None]) -> str:
    """SVG path that breaks where a value is missing."""
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    return "".join(parts)


def _band(curve: Curve, x: Scale, y: Scale) -> str:
    low = [p for p in _points(curve.x, curve.low, x, y) if p]
    high = [p for p in _points(curve.x, curve.high, x, y) if p]
    if not low or not high:
        return ""
    return f'<path class="band t-{curve.tone}" d="{_path([*high, *reversed(low)])}Z"/>'


def _line(curve: Curve, x: Scale, y: Scale) -> str:
    dash = " dashed" if curve.dashed else ""
    return f'<path class="line t-{curve.tone}{dash}" d="{_path(_points(curve.x, curve.y, x, y))}"/>'


def _dots(curve: Curve, x: Scale, y: Scale, y_text: Callable[[float], str]) -> str:
    points = _points(curve.x, curve.y, x, y)
    if len(points) > MARKERS or curve.dashed:
        return ""
    parts = []
    for index, (point, value) in enumerate(zip(points, curve.y, strict=False)):
        if point is None or value is None:
            continue
        when = "before training" if index == 0 else f"round {index}"
        tip = esc(f"{curve.label} {when}: {y_text(value)}".strip())
        parts.append(
            f'<circle class="dot t-{curve.tone}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3">'
            f"<title>{tip}</title></circle>"
        )
    return "".join(parts)


def _end_labels(
    curves: Sequence[Curve], x: Scale, y: Scale, shape: Shape, y_text: Callable[[float], str]
) -> str:
    ends = [(curve, value) for curve in curves if (value := last(curve.y)) is not None]
    wanted = [y(value) for _, value in ends]
    places = spread_out(wanted, LABEL_GAP, shape.top, shape.height - shape.bottom)
    parts = []
    for (curve, _), place, true in zip(ends, places, wanted, strict=True):
        at, tip = x.end + 14, _tip(curve, x)
        far = "" if tip > x.end - 1 else " far"
        parts.append(
            f'<path class="lead t-{curve.tone}{far}" d="M{tip + 3:.1f} {true:.1f}L{at - 2:.1f} '
            f'{place:.1f}"/><text class="end" x="{at + 2:.1f}" y="{place + 4:.1f}">'
            f'<tspan class="value">{esc(curve.end(y_text))}</tspan> {esc(curve.label)}</text>'
        )
    return "".join(parts)


def _tip(curve: Curve, x: Scale) -> float:
    """Where a line ends, which is before the others when its run was shorter."""
    ends = [a for a, b in zip(curve.x, curve.y, strict=False) if a is not None and b is not None]
    return x(ends[-1]) if ends else x.end


def _start_label(
    curves: Sequence[Curve], x: Scale, y: Scale, y_text: Callable[[float], str], start: str
) -> str:
    first = curves[0].y[0] if curves and curves[0].y else None
    if not start or first is None:
        return ""
    words = f"{start} {y_text(first)}"
    return f'<text class="tick" x="{x.start:.1f}" y="{y(first) - 10:.1f}">{esc(words)}</text>'
