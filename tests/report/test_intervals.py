"""Student's t against published values, and the interval against its definition."""

from __future__ import annotations

import math

import pytest

from fedtune.report.intervals import t_interval, t_quantile

# Two-sided 95 %: degrees of freedom -> t, from the usual tables, three decimals.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042}


@pytest.mark.parametrize(("degrees", "value"), TABLE.items())
def test_quantiles_of_the_tables(degrees: int, value: float):
    assert t_quantile(0.975, degrees) == pytest.approx(value, abs=5e-4)


def test_many_degrees_are_nearly_normal():
    assert t_quantile(0.975, 2000) == pytest.approx(1.96, abs=2e-3)


def test_interval_of_three_seeds():
    found = t_interval([1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)


def test_one_seed_has_no_interval():
    assert t_interval([0.5]) == (0.5, None, None, 1)
