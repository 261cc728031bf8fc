"""HTML building blocks; `cell`, `sub` and headings escape what they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtune.report import text
from fedtune.report.curves import COMPARE_TONES
from fedtune.report.svg import esc

__all__ = ["bar", "cell", "low_high", "section", "sub", "table", "unbroken"]


def section(title: str, note: str, content: str) -> str:
    """A titled block."""
    words = f'<p class="note">{esc(note)}</p>' if note else ""
    return f"<section><h2>{esc(title)}</h2>{words}{content}</section>"


def cell(value: object, css: str) -> str:
    """One table cell; an empty class is left out."""
    kind = f' class="{css}"' if css else ""
    return f"<td{kind}>{esc(value)}</td>"


def sub(words: str) -> str:
    """A quiet second line of a cell."""
    return f'<span class="sub">{esc(words)}</span>' if words else ""


def unbroken(words: str) -> str:
    """Keep `%` and `MB` on the line of their number."""
    return words.replace(" %", "\N{NO-BREAK SPACE}%").replace(" MB", "\N{NO-BREAK SPACE}MB")


def low_high(values: tuple[float, float] | None) -> str:
    """Lowest and highest over seeds or clients, as a second line."""
    if values is None:
        return ""
    return sub(f"{text.loss(values[0])} to {text.loss(values[1])}")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table that scrolls in its own box; a head that starts with `#` is over figures."""
    top = "".join(
        f'<th scope="col" class="n">{esc(head[1:])}</th>'
        if head.startswith("#")
        else f'<th scope="col">{esc(head)}</th>'
        for head in heads
    )
    body = "".join(
        f'<tr class="{css}">{"".join(row)}</tr>' if css else f"<tr>{''.join(row)}</tr>"
        for row, css in zip(rows, classes or [""] * len(rows), strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def bar(parts: Mapping[str, float], *, legend: bool = True) -> str:
    """Shares of a whole as one bar; a part keeps the colour of its position."""
    whole = sum(parts.values())
    if whole <= 0:
        return ""
    tones = {name: COMPARE_TONES[i % len(COMPARE_TONES)] for i, name in enumerate(parts)}
    shares = {name: 100 * value / whole for name, value in parts.items() if value > 0}
    blocks = "".join(
        f'<i class="t-{tones[name]}" style="width:{share:.2f}%"></i>'
        for name, share in shares.items()
    )
    drawn = f'<div class="bar" aria-hidden="true">{blocks}</div>'
    if not legend:
        return drawn
    keys = "".join(
        f'<li class="t-{tones[name]}"><span class="key"></span>{esc(name)} '
        f"<b>{share:.0f} %</b></li>"
        for name, share in shares.items()
    )
    return f'{drawn}<ul class="bar-legend">{keys}</ul>'
