"""One attempt of a round while its replies come in: all that is summed up over them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.strategies.base import ClientStats, Method, Round
from fedtune.strategies.mean import RunningMean
from fedtune.strategies.residuals import Certificate
from fedtune.strategies.updates import Update

__all__ = ["Gathering", "squared_distance"]


class Gathering:
    """Sums over the good replies of a round.

    Args:
        now: the round.
        static: frozen tensors that every client has.
        certified: whether the factors are kept for the residuals.
        same_coordinates: whether a parameter means the same before and after the round, and at all
            clients, so that distances between them have a meaning.
    """

    def __init__(
        self,
        method: Method,
        now: Round,
        static: Mapping[str, Tensor],
        *,
        certified: bool,
        same_coordinates: bool,
    ) -> None:
        self._method, self._static = method, static
        self.fold = method.fold(now)
        self.control = RunningMean()
        self.certificate = Certificate(now.scaling) if certified else None
        self.spread = Spread() if same_coordinates else None
        self.stats: list[ClientStats] = []

    def add(self, update: Update, start: Mapping[str, Tensor]) -> None:
        """Fold one client's update in; `start` is what it was sent.

        Raises:
            ManifestError: the method cannot use it.
        """
        weight = self._method.weigh(update.stats)
        self.fold.add(update.params, weight)
        self.stats.append(update.stats)
        if update.control_change:
            self.control.add(update.control_change, self._method.share(update.stats))
        if self.certificate is not None:
            self.certificate.add({**self._static, **start, **update.params}, weight)
        if self.spread is not None:
            self.spread.add(squared_distance(update.params, start), weight)


class Spread:
    """Weighted spread of client updates from running sums: sum p|d_k|^2 - |sum p d_k|^2."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def add(self, squared_norm: float, weight: float) -> None:
        """One client's update."""
        self._sum += weight * squared_norm
        self._weight += weight

    def around(self, squared_norm_of_mean: float) -> float:
        """Root of the spread around the mean update."""
        return math.sqrt(max(0.0, self._sum / self._weight - squared_norm_of_mean))


def squared_distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Sum of squares over the tensors of `left`."""
    return sum(float(torch.sum((left[name].double() - right[name].double()) ** 2)) for name in left)
