"""Tables of the benchmarks: a head and rows of text, aligned or as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], mean: str, std: str) -> str:
    """Mean, and standard deviation over several seeds."""
    if not values:
        return "-"
    text = format(statistics.fmean(values), mean)
    return f"{text} ± {format(statistics.stdev(values), std)}" if len(values) > 1 else text


def as_markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    head, *others = (f"| {' | '.join(line)} |" for line in lines)
    return [head, "|---" * len(lines[0]) + "|", *others]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
