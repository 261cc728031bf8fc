"""No client has more than its share of a round."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.server.rounds.weights import Scale, heaviest

SHARES = [0.1, 0.25, 0.3, 0.5, 0.9]
WEIGHTS = st.lists(st.integers(1, 2**53 - 1), min_size=1, max_size=7)


def settled(weights: list[float], share: float, absent: tuple[float, ...] = ()) -> list[float]:
    """What each weight has become."""
    scale: Scale[int] = Scale(share, len(weights) + len(absent))
    found = dict.fromkeys(range(len(weights)), math.inf)
    for k, weight in enumerate(weights):
        for ready in scale.put(k, weight):
            found[ready] = weights[ready]
    for k, most in scale.settle(absent):
        found[k] = min(weights[k], most)
    return [found[k] for k in range(len(weights))]


@pytest.mark.parametrize(
    ("weights", "share", "expected"),
    [
        ([600, 100, 100], 0.5, [200, 100, 100]),
        ([2**53 - 1, 100, 300], 0.5, [400, 100, 300]),
        ([100, 100, 100], 0.5, [100, 100, 100]),
        ([200, 100, 100], 0.5, [200, 100, 100]),
        ([1000, 1000, 1, 1], 0.25, [1, 1, 1, 1]),
        ([1000, 900, 10, 10, 10], 0.3, [22, 22, 10, 10, 10]),
        ([7, 2, 1], 0.1, [1, 1, 1]),  # three cannot all have less than a third
        ([7, 2, 1], 1.0, [7, 2, 1]),
        ([900, 100], 0.5, [900, 100]),  # of two one has more than the other
    ],
)
def test_examples(weights: list[float], share: float, expected: list[float]) -> None:
    assert settled(weights, share) == expected


@given(weights=WEIGHTS, share=st.sampled_from(SHARES))
def test_nobody_has_more_than_the_share_and_who_has_less_keeps_it(
    weights: list[int], share: float
) -> None:
    """In exact numbers, where a whole cut is at most one below the bound."""
    c = heaviest(weights, share)
    cut = [min(weight, c) for weight in weights]
    part = Fraction(str(share))
    if part * len(weights) >= 1:
        assert max(cut) <= part * sum(map(Fraction, cut)) or max(cut) == min(weights)
    if c < max(weights):  # the bound is the largest one
        more = [min(Fraction(weight), Fraction(c) + 1) for weight in weights]
        assert Fraction(c) + 1 > part * sum(more)
        assert c == int(c)


@given(weights=WEIGHTS, share=st.sampled_from(SHARES))
def test_holding_back_a_few_is_as_good_as_knowing_all(weights: list[int], share: float) -> None:
    """The definition: all weights at once. What was let go early would not have been cut."""
    expected = [min(weight, heaviest(weights, share)) for weight in weights]
    assert settled(list(weights), share) == (expected if len(weights) > 2 else weights)


def test_the_order_of_arrival_does_not_matter() -> None:
    weights = [5.0, 400.0, 30.0, 30.0]
    for order in itertools.permutations(range(4)):
        found = settled([weights[k] for k in order], 0.4)
        assert dict(zip(order, found, strict=True)) == {0: 5.0, 1: 43.0, 2: 30.0, 3: 30.0}


def test_who_was_asked_counts_though_he_has_not_answered() -> None:
    assert settled([100, 10], 0.5, absent=(100,)) == [100, 10]
    assert settled([100, 10], 0.5, absent=(20,)) == [30, 10]
    assert settled([100, 10], 0.5, absent=(0,)) == [10, 10]


def test_few_are_held_back() -> None:
    """One of any number with a share of a half, none without a bound."""
    for share, most in ((0.5, 1), (0.3, 3), (1.0, 0)):
        scale: Scale[int] = Scale(share, 50)
        for k in range(50):
            list(scale.put(k, float(k % 7 + 1)))
            assert len(scale) <= most
