"""The bound on an update's norm, from the records of finished rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedtune.server.rounds.bounds import Bounds
from fedtune.server.rounds.norms import NORM, bound_of, norm_key
from fedtune.strategies.vectors import length, shortened


def rounds(*norms: Sequence[float], steps: int = 4) -> list[dict[str, Any]]:
    """Records as a run leaves them."""
    first: dict[str, Any] = {"round": 0}
    replies = [[{NORM: norm, "steps": steps} for norm in given] for given in norms]
    return [first, *({"round": k, "replies": r} for k, r in enumerate(replies, start=1))]


def most(*norms: Sequence[float], after: int = 4, **given: Any) -> float:
    """The bound after these rounds, where the global's norm is 2."""
    return bound_of(rounds(*norms), NORM, first=lambda: 3000.0, **given).most(after)[0]


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([], 3000),
        ([(1, 2), (1, 2)], 3000),
        ([(1, 3), (1, 3), (1, 3)], 20),
        ([(9, 9, 9), (1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3)], 20),  # the last five
        ([(0, 0), (0, 0), (1, 3), (1, 3)], 3000),  # rounds at a learning rate of 0
        ([(0, 0), (1, 3), (0, 0), (1, 3), (1, 3), (0, 0), (0, 0), (0, 0)], 20),
        ([(0, 2), (0, 2), (0, 0, 2)], 20),  # clients without anything to learn
        ([(1e-9, 1e-9)] * 3, 1e-2),  # the floor
        ([(1, 1, 1000)] * 3, 10),
    ],
)
def test_the_bound(norms: list[Sequence[float]], expected: float) -> None:
    assert most(*norms) == pytest.approx(expected)


def test_ten_rounds_of_one_step_with_warmup_refuse_nobody() -> None:
    """The first has a rate of 0; every norm is the rate's share of the last one's."""
    norms = [(0.001 * k, 0.002 * k) for k in range(10)]
    for k, (_, longest) in enumerate(norms):
        assert longest <= most(*norms[:k], after=1)


def test_more_steps_move_further() -> None:
    """In silos of unequal size, up to ten times as many; fewer steps leave the bound as it is."""
    known = [(1.0, 1.0, 1.0)] * 3
    assert [most(*known, after=n) for n in (1, 4, 40, 400, 10**7)] == [10, 10, 100, 100, 100]


def test_the_users_bound_holds_where_it_is_lower() -> None:
    known = [(1.0, 1.0)] * 3
    assert [most(*known, absolute=x) for x in (None, 3.0, 30.0)] == [10, 3, 10]
    assert most(absolute=3.0) == 3


def test_where_most_are_longer_the_round_has_changed() -> None:
    """By their median, never beyond what the first rounds are held to."""
    known = [(1.0, 1.0)] * 3
    assert [most(*known, risen=x) for x in (0.5, 50.0, 1e9)] == [10, 500, 3000]


def test_records_of_an_earlier_version_hold_no_norms() -> None:
    records = [{"round": k, "replies": [{"client": "a", "steps": 1}]} for k in range(1, 9)]
    assert bound_of(records, NORM, first=lambda: 7.0).most(1)[0] == 7
    assert bound_of(rounds((1, 1)) * 4, norm_key("control"), first=lambda: 7.0).most(1)[0] == 7


def test_most_of_those_who_were_asked_must_be_longer() -> None:
    """One alone tells only where nobody else is there."""
    for lengths, asked, there, expected in (
        ([9, 9, 1], 3, 3, {NORM: 9}),
        ([9, 1, 1], 3, 3, {}),
        ([9, 1], 2, 2, {}),
        ([9], 1, 1, {NORM: 9}),
        ([9], 1, 10, {}),
    ):
        judge = Bounds().judge([], {}, {}, {})
        judge.params.norms += lengths
        judge.params.above += [norm for norm in lengths if norm > 1]
        assert judge.risen(asked, there) == expected


def test_shortened_keeps_the_direction() -> None:
    start = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor([3])}
    params = {"a": torch.tensor([4.0, 6.0]), "n": torch.tensor([9])}
    found = shortened(params, start, 0.5)
    assert torch.equal(found["a"], torch.tensor([2.5, 4.0]))
    assert torch.equal(found["n"], params["n"])
    assert torch.equal(shortened(params, None, 0.5)["a"], torch.tensor([2.0, 3.0]))
    assert length(start) == pytest.approx(math.sqrt(5))
    assert length({"a": torch.full((3,), 3e38)}) == pytest.approx(3e38 * math.sqrt(3), rel=1e-6)
