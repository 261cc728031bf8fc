"""Student's t interval of a mean: what a difference over a few seeds may really be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Interval", "t_interval", "t_quantile"]

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over some seeds and its 95 % confidence interval, None with a single one."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of at least one value, +- t(n - 1) * s / sqrt(n)."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    half = t_quantile(0.5 + LEVEL / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def t_quantile(probability: float, degrees: int) -> float:
    """Where Student's t with `degrees` of freedom reaches `probability` (above 0.5, below 1)."""
    low, high = 0.0, 1.0
    while _cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _cdf(middle, degrees) < probability else (low, middle)
    return high


def _cdf(t: float, degrees: int) -> float:
    """The distribution function for whole degrees: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = term if degrees > 1 else 0.0
    for k in range(2 if odd else 1, degrees - 1, 2):
        term *= square * k / (k + 1)
        total += term
    return 0.5 + (angle + total) / math.pi if odd else 0.5 + total / 2
