"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, Algorithm 1, option II).

    x_i <- mean of y_k,i without the floor(beta K) smallest and as many of the largest

which is x plus the trimmed mean of the deltas. Withstands a share beta of the clients being
arbitrary; ignores weights. Server memory: clients x parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from fedtune.strategies.base import ANY_ROUND, ClientStats, Fold, Properties, Round, Rule
from fedtune.strategies.keep_all import Keep, by_coordinate
from fedtune.strategies.settings import Range, setting

__all__ = ["TrimmedMean"]

LESS_THAN_HALF = Range("a number >= 0 and < 0.5", lambda value: 0 <= value < 0.5)


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """The mean of the middle values of every coordinate.

    Attributes:
        beta: share of the clients that is dropped at each end.
    """

    beta: float = setting(0.2, LESS_THAN_HALF)

    properties = Properties(sum_suffices=False, robust=True)

    def least_updates(self) -> int:
        """With fewer there is nothing to drop."""
        return math.ceil(1 / Fraction(str(self.beta))) if self.beta else 1

    def weigh(self, stats: ClientStats) -> float:
        """Every client alike."""
        return 1.0

    def fold(self, now: Round = ANY_ROUND) -> Fold:
        """Keeps all updates."""
        return Keep(self._trimmed)

    def _trimmed(self, updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        count = len(updates)
        # As written: 0.29 * 100 is below 29 in fp64.
        cut = math.floor(Fraction(str(self.beta)) * count)
        return by_coordinate(updates, lambda values: values[cut : count - cut].mean(0))
