"""Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, Algorithm 1).

    x_i <- median_k y_k,i

which is x plus the median of the deltas. For an even number of clients it is the mean of the two
middle values. Withstands fewer than half of the clients being arbitrary; ignores weights. Server
memory: clients x parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedtune.strategies.base import ANY_ROUND, ClientStats, Fold, Properties, Round, Rule
from fedtune.strategies.keep_all import Keep, by_coordinate

__all__ = ["Median"]


@dataclass(frozen=True)
class Median(Rule):
    """The middle value of every coordinate."""

    properties = Properties(sum_suffices=False, robust=True)

    def weigh(self, stats: ClientStats) -> float:
        """Every client alike."""
        return 1.0

    def fold(self, now: Round = ANY_ROUND) -> Fold:
        """Keeps all updates."""
        return Keep(_median)


def _median(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    count = len(updates)
    return by_coordinate(
        updates, lambda values: (values[(count - 1) // 2] + values[count // 2]) / 2
    )
