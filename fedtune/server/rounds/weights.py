"""How heavy one client may weigh in a round: at most a share of all weights.

    w_k <- min(w_k, c),   c the largest number with c <= share sum_j min(w_j, c)

over all clients that were asked: those that have answered as they say, the others as they weighed
last, or as they declared. Where so few are there that no c holds, all weigh as the lightest.
Whoever may be too heavy is held back until the others are known, and folded last: at most
1 / share - 1 updates, one with a share of a half. c is whole where the weights are, so that
products with values stay exact (`mean.py`), and does not depend on the order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Generic, TypeVar

__all__ = ["FEWEST", "Scale", "heaviest"]

FEWEST = 3  # clients asked, from which on no client may have more than its share

T = TypeVar("T")


def heaviest(weights: Sequence[float], share: float) -> float:
    """The weight c above which a client is cut."""
    part, sorted_up = Fraction(str(share)), sorted(map(Fraction, weights))
    below = Fraction(0)
    # All from `light` on are cut to c = share (below + heavy c), where that leaves them heavier.
    for light, weight in enumerate(sorted_up):
        heavy = len(sorted_up) - light
        if part * heavy < 1:
            c = part * below / (1 - part * heavy)
            if c < weight:
                return max(_whole(c, sorted_up), float(sorted_up[0]))
        below += weight
    return math.inf


def _whole(c: Fraction, weights: Iterable[Fraction]) -> float:
    return float(c // 1) if all(weight.denominator == 1 for weight in weights) else float(c)


class Scale(Generic[T]):
    """The updates of one attempt on their way into the fold.

    Args:
        share: that one client may have; 1 for no bound.
        asked: clients.
    """

    def __init__(self, share: float, asked: int) -> None:
        self._share = share
        bounded = asked >= FEWEST and share < 1
        self._most = math.ceil(1 / Fraction(str(share))) - 1 if bounded else 0
        self._held: list[tuple[float, T]] = []
        self._weights: list[float] = []

    def __len__(self) -> int:
        return len(self._held)

    def put(self, item: T, weight: float) -> Iterator[T]:
        """Take one update; yields those that cannot be too heavy, whoever else comes."""
        self._weights.append(weight)
        self._held.append((weight, item))
        self._held.sort(key=lambda one: one[0])  # of equal ones the first goes first
        while len(self._held) > self._most:
            yield self._held.pop(0)[1]

    def settle(self, absent: Iterable[float]) -> Iterator[tuple[T, float]]:
        """What was held back, with the weight that it may have at most.

        Args:
            absent: weights of those who were asked and have sent nothing that counts.
        """
        most = heaviest([*self._weights, *absent], self._share) if self._most else math.inf
        held, self._held = self._held, []
        for _, item in held:
            yield item, most
