"""`loss.png` and the figure of `fedtune plot`: matplotlib without a display."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeVar

from fedtune.report import figures
from fedtune.report.curves import (
    PALETTE,
    Curve,
    compare_curves,
    gap_curves,
    loss_curves,
    traffic_curves,
)
from fedtune.report.findings import headline
from fedtune.report.svg import spread_out
from fedtune.report.unlike import Note
from fedtune.results.series import Values, last
from fedtune.results.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_compare", "draw_loss", "drawn"]

log = logging.getLogger(__name__)

INK, SOFT, RULE, WARNING = "#15191e", "#5a6470", "#e6e9ed", "#b3400a"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10.5,
    "text.parse_math": False,  # a `$` in a directory's name is a `$`
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
WIDTH_IN, DPI = 9.6, 200  # 1920 px: sharp when shown at 900
NOTE_IN, NOTE_WIDTH = 0.19, 130  # height of a line below a picture; its characters
SAME = 0.01  # of a line's height: nearer lines cannot be told apart
DRAFT_DPI = 100  # while labels are placed; positions are in points and so hold at any DPI


T = TypeVar("T")


def drawn(draw: Callable[[T, Path], Path], what: T, path: Path) -> Path | None:
    """`draw(what, path)`, or None and a warning where it cannot be drawn: it is only a picture."""
    try:
        return draw(what, path)
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        log.warning("%s could not be drawn: %s", path, words)
        return None


def draw_loss(summary: Summary, path: str | Path) -> Path:
    """Eval loss against samples of every arm; below it, the gap to centralized and the traffic."""
    panels: list[tuple[str, list[Curve], Callable[[float], str]]] = [
        (
            "Gap to centralized, % after each round",
            gap_curves(summary),
            lambda value: figures.percent(value, signed=True),
        ),
        (
            "Traffic, cumulative MB on the wire",
            traffic_curves(summary),
            lambda value: figures.megabytes(value * 1e6),
        ),
    ]
    panels = [panel for panel in panels if panel[1]]
    with _style():
        figure = _figure(6.9 if panels else 4.6)
        grid = figure.add_gridspec(
            2 if panels else 1,
            max(len(panels), 1),
            height_ratios=[1.75, 1] if panels else None,
            hspace=0.42,
            wspace=0.5,
        )
        axes = figure.add_subplot(grid[0, :])
        _draw(axes, loss_curves(summary), figures.loss, _x_title(summary))
        _start_label(axes, summary)
        for column, (title, curves, y_text) in enumerate(panels):
            axes = figure.add_subplot(grid[1, column])
            _draw(axes, curves, y_text, "round")
            axes.set_title(title, pad=10)
            axes.axhline(0, color=SOFT, linewidth=0.8)
        _titles(figure, headline(summary), "Held-out loss; the same rows for every arm")
        return _save(figure, path)


def draw_compare(
    summaries: Sequence[Summary], path: str | Path, notes: Sequence[Note] = ()
) -> Path:
    """One federated curve per run; below, what a reader must know before comparing them."""
    told = [(line, note.serious) for note in notes for line in wrap(note.words, NOTE_WIDTH)]
    with _style():
        height = 4.9 + NOTE_IN * len(told)
        figure = _figure(height)
        curves = compare_curves(summaries)
        longest = max((len(curve.label) for curve in curves), default=0)
        right = max(0.4, 1 - (0.85 + 0.08 * longest) / WIDTH_IN)
        figure.subplots_adjust(right=right, bottom=(0.72 + NOTE_IN * len(told)) / height)
        titles = {_x_title(summary) for summary in summaries}
        _draw(
            figure.add_subplot(),
            curves,
            figures.loss,
            titles.pop() if len(titles) == 1 else "samples seen, or rounds",
        )
        runs = f"{len(summaries)} run{'' if len(summaries) == 1 else 's'}"
        _titles(figure, f"Held-out loss of {runs}", "Federated arm; bands span the seeds")
        for index, (line, serious) in enumerate(reversed(told)):
            place = (0.12 + NOTE_IN * index) / height
            color, weight = (WARNING, "bold") if serious else (SOFT, "normal")
            figure.text(0.03, place, line, fontsize=9, color=color, fontweight=weight)
        return _save(figure, path)


@contextmanager
def _style() -> Iterator[None]:
    with _no_backend():
        from matplotlib import rc_context
    with rc_context(STYLE):
        yield


@contextmanager
def _no_backend() -> Iterator[None]:
    """Notebooks name one in MPLBACKEND for all that they start, whether it is there or not."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


def _figure(height_in: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DRAFT_DPI)
    FigureCanvasAgg(figure)  # no pyplot: nothing global is opened or chosen
    top = 1 - 0.85 / height_in
    figure.subplots_adjust(left=0.075, right=0.735, top=top, bottom=0.62 / height_in)
    return figure


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    height = float(figure.get_figheight())
    figure.text(0.03, 1 - 0.36 / height, title, fontsize=14, fontweight="bold", color=INK)
    figure.text(0.03, 1 - 0.61 / height, subtitle, color=SOFT)


def _save(figure: Figure, path: str | Path) -> Path:
    target = Path(path)
    draft = target.with_name(f".{target.name}.tmp")
    try:
        figure.savefig(draft, dpi=DPI, facecolor="white", format="png")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def _x_title(summary: Summary) -> str:
    counted = last(summary.federated.mean.samples) is not None
    return "samples seen, all clients together" if counted else "round"


def _draw(
    axes: Axes, curves: Sequence[Curve], y_text: Callable[[float], str], x_title: str
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for index, curve in reversed(list(enumerate(curves))):
        _draw_curve(axes, curve, sum(_alike(curve, other) for other in curves[:index]))
    axes.margins(x=0.0, y=0.09)
    axes.set_xlabel(x_title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: figures.compact(value)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_axisbelow(True)
    _end_labels(axes, curves, y_text)


def _alike(curve: Curve, other: Curve) -> bool:
    """Whether one would hide the other."""
    here, there = _floats(curve.y), _floats(other.y)
    near = SAME * (max(there, default=0.0) - min(there, default=0.0))
    pairs = zip(here, there, strict=False)
    return len(here) == len(there) and all(abs(a - b) <= near for a, b in pairs)


def _draw_curve(axes: Axes, curve: Curve, above: int) -> None:
    """`above`: how many lines it lies on; it is drawn over them in dashes that leave them gaps."""
    color = PALETTE[curve.tone][0]
    size = min(len(curve.x), len(curve.y))
    x, y = _floats(curve.x[:size]), _floats(curve.y[:size])
    if curve.low and curve.high:
        band = min(size, len(curve.low), len(curve.high))
        low, high = _floats(curve.low[:band]), _floats(curve.high[:band])
        axes.fill_between(x[:band], low, high, color=color, alpha=0.14, linewidth=0)
    ours = curve.tone == "federated" and not curve.dashed
    axes.plot(
        x,
        y,
        color=color,
        linewidth=2.4 if ours else 1.7,
        linestyle=(0, (4, 3)) if curve.dashed else (4 * above, (4, 8)) if above else "-",
        marker="o" if size <= 40 and not curve.dashed and not above else "",
        markersize=4.2,
        markeredgecolor="white",
        markeredgewidth=0.8,
        clip_on=False,
        zorder=4 if above else 3 if ours else 2,
    )


def _end_labels(axes: Axes, curves: Sequence[Curve], y_text: Callable[[float], str]) -> None:
    """Name and final value right of each line, moved apart where they would touch."""
    ends = [(curve, value) for curve in curves if (value := last(curve.y)) is not None]
    if not ends:
        axes.text(
            0.5, 0.5, "no round was finished", transform=axes.transAxes, ha="center", color=SOFT
        )
        return
    low, high = axes.get_ylim()
    box = axes.get_window_extent()
    width, height = box.width * 72 / DRAFT_DPI, box.height * 72 / DRAFT_DPI  # points
    wanted = [(value - low) / (high - low) * height for _, value in ends]
    for (curve, value), place in zip(ends, spread_out(wanted, 15, 0, height), strict=True):
        known = [x for x, y in zip(curve.x, curve.y, strict=False) if None not in (x, y)]
        axes.annotate(
            f"{curve.end(y_text)}  {curve.label}",
            xy=(known[-1] or 0.0, value),
            xytext=(width + 14, place),
            textcoords="axes points",
            va="center",
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": PALETTE[curve.tone][0],
                "linewidth": 1.2,
                "linestyle": "-" if known[-1] == axes.get_xlim()[1] else ":",  # a shorter run
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 4,
            },
        )


def _start_label(axes: Axes, summary: Summary) -> None:
    first = next(iter(summary.federated.mean.eval_loss), None)
    if first is not None and summary.rounds:
        axes.annotate(
            f"{summary.start} {figures.loss(first)}",
            xy=(axes.get_xlim()[0], first),
            xytext=(6, 7),
            textcoords="offset points",
            color=SOFT,
        )


def _floats(values: Values) -> list[float]:
    return [float("nan") if value is None else value for value in values]
