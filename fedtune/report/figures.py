"""Numbers as people read them; a missing number is a dash."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["compact", "count", "flat", "loss", "megabytes", "percent", "plain", "seconds", "tick"]

DASH = "\N{EN DASH}"


def loss(value: float | None) -> str:
    """`2.451`; small and huge values keep four digits."""
    if value is None:
        return DASH
    return f"{value:.3f}" if 0.1 <= abs(value) < 1000 or value == 0 else f"{value:.4g}"


def plain(value: float | None) -> str:
    """Three significant digits: norms, drifts."""
    return DASH if value is None else f"{value:#.3g}".rstrip(".")


def count(value: float | None) -> str:
    """`12,800`."""
    return DASH if value is None else f"{value:,.0f}"


def compact(value: float) -> str:
    """`800`, `12.8k`, `1.2M`: axis labels."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def tick(value: float, ticks: Sequence[float]) -> str:
    """An axis label with as many decimals as its neighbours: `2.40`, `2.45`."""
    if max(map(abs, ticks)) >= 1000:
        return compact(value)
    digits = max(len(f"{other:.6g}".partition(".")[2]) for other in ticks)
    return f"{value:.{digits}f}" if digits < 6 else f"{value:.3g}"


def megabytes(value: float | None) -> str:
    """Bytes as MB (10^6), without a unit: `1,204`, `12.3`, `0.42`, `0.0042`."""
    if value is None:
        return DASH
    mb = value / 1e6
    return f"{mb:,.{0 if mb >= 1000 else 1 if mb >= 10 else 2 if mb >= 0.1 or not mb else 4}f}"


def seconds(value: float | None) -> str:
    """`0.42`, `12.3`, `1,204`, without a unit."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float | None, *, signed: bool = False) -> str:
    """`+1.3 %`; small values keep a digit: `0.04 %`."""
    if value is None:
        return DASH
    digits = 1 if abs(value) >= 0.1 or value == 0 else 2
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return f"{text} %"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `group.name` and value, both text."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value, default=str)
