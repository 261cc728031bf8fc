"""What the templates draw: sections of tables, cells, bars and figures. Text, never HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedtune.report import figures
from fedtune.report.curves import COMPARE_TONES, Curve

__all__ = ["Cell", "Figure", "Section", "Share", "Table", "cells", "low_high", "shares"]


@dataclass(frozen=True)
class Share:
    """Part of a whole; it keeps the colour of its position."""

    tone: str
    name: str
    percent: float


@dataclass(frozen=True)
class Cell:
    """One table cell.

    Attributes:
        css: class of the cell; empty: none.
        sub: a quiet second line.
        under: one below words that are bold; it may wrap.
        shares: drawn as a bar above the words.
    """

    words: str
    css: str = ""
    sub: str = ""
    under: str = ""
    shares: Sequence[Share] = ()


@dataclass(frozen=True)
class Table:
    """A table in a box of its own; a head that starts with `#` is over figures.

    Attributes:
        ours_first: whether the first row is the federated arm's, which stands out.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    ours_first: bool = False


@dataclass(frozen=True)
class Section:
    """A titled block: note, warnings, bar and tables, as far as there are any."""

    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    shares: Sequence[Share] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A chart, drawn already, with a legend for narrow screens where lines carry no names."""

    title: str
    caption: str
    chart: Markup
    legend: Sequence[Curve] = ()


def cells(words: Sequence[str], css: str = "n") -> list[Cell]:
    """Cells of one class, of figures by default."""
    return [Cell(word, css) for word in words]


def low_high(values: tuple[float, float] | None) -> str:
    """Lowest and highest over seeds or clients, for a second line."""
    return "" if values is None else f"{figures.loss(values[0])} to {figures.loss(values[1])}"


def shares(parts: Mapping[str, float]) -> list[Share]:
    """Shares of a whole, without those of nothing."""
    whole = sum(parts.values())
    tones = {name: COMPARE_TONES[index % len(COMPARE_TONES)] for index, name in enumerate(parts)}
    return [
        Share(tones[name], name, 100 * value / whole)
        for name, value in parts.items()
        if whole > 0 and value > 0
    ]
