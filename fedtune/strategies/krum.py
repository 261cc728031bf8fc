"""Krum and Multi-Krum: trust the updates that lie close together (Blanchard et al. 2017).

    score_i = sum of the n - f - 2 smallest |y_i - y_j|^2, j != i
    Krum:        x <- the update with the lowest score
    Multi-Krum:  x <- mean of the m updates with the lowest scores

arXiv 1703.02757; withstands f arbitrary clients of n >= 2 f + 3; ignores weights. A distance of
updates is that of their deltas. It is summed from differences in fp64; in fp32 the usual
|y_i|^2 + |y_j|^2 - 2 y_i y_j is rounding noise where deltas are small against the parameters. Equal
scores (the two closest updates', if n = f + 3) are told apart by content, so that the order of
arrival never matters.
Server memory: clients x parameters; time: n^2 / 2 passes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.errors import RoundError
from fedtune.strategies.base import ANY_ROUND, ClientStats, Fold, Properties, Round, Rule
from fedtune.strategies.keep_all import BLOCK, Keep
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.names import lora_modules
from fedtune.strategies.mean import RunningMean
from fedtune.strategies.settings import COUNT, FLAG, setting

__all__ = ["Krum", "MultiKrum", "product_distance", "ranking", "scores"]

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Krum(Rule):
    """The one update that is closest to its neighbours.

    Attributes:
        f: clients that may be arbitrary.
        products: 1 for the distance between the LoRA products B A, which does not depend on how a
            client splits them into B and A; other tensors count as they are.
    """

    f: int = setting(1, COUNT)
    products: int = setting(0, FLAG)

    properties = Properties(sum_suffices=False, robust=True)

    def weigh(self, stats: ClientStats) -> float:
        """Every client alike."""
        return 1.0

    def least_updates(self) -> int:
        """2 f + 3."""
        return 2 * self.f + 3

    def fold(self, now: Round = ANY_ROUND) -> Fold:
        """Keeps all updates."""
        return Keep(lambda updates: _mean_of_best(updates, self, 1, now))


@dataclass(frozen=True)
class MultiKrum(Rule):
    """The mean of the updates that are closest to their neighbours.

    Attributes:
        f: clients that may be arbitrary.
        m: updates to average; 0 for n - f - 2, as many as a score has terms.
        products: 1 for the distance between the LoRA products B A, which does not depend on how a
            client splits them into B and A; other tensors count as they are.
    """

    f: int = setting(1, COUNT)
    m: int = setting(0, COUNT)
    products: int = setting(0, FLAG)

    properties = Properties(sum_suffices=False, robust=True)

    def weigh(self, stats: ClientStats) -> float:
        """Every client alike."""
        return 1.0

    def least_updates(self) -> int:
        """2 f + 3, or what makes m <= n - f - 2."""
        return max(2 * self.f + 3, self.m + self.f + 2)

    def fold(self, now: Round = ANY_ROUND) -> Fold:
        """Keeps all updates."""
        return Keep(
            lambda updates: _mean_of_best(updates, self, self.m or len(updates) - self.f - 2, now)
        )


def ranking(
    updates: Sequence[Params], f: int, scaling: Mapping[str, float] | None = None
) -> list[int]:
    """Indices of the updates by rising score; `scaling` as for `scores`."""
    points = scores(updates, f, scaling)
    if len(set(points)) == len(points):
        return sorted(range(len(points)), key=points.__getitem__)
    return sorted(range(len(points)), key=lambda i: (points[i], _content(updates[i])))


def scores(
    updates: Sequence[Params], f: int, scaling: Mapping[str, float] | None = None
) -> list[float]:
    """Krum's score of every update.

    Given `scaling`, LoRA module -> factor of B @ A (1 if it is not in there), the distances are
    those of the scaled products.
    """
    count = len(updates)
    squared = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            squared[i][j] = squared[j][i] = _squared_distance(updates[i], updates[j], scaling)
    return [
        math.fsum(sorted(row[:i] + row[i + 1 :])[: count - f - 2]) for i, row in enumerate(squared)
    ]


def product_distance(left: Factors, right: Factors) -> float:
    """|B_1 A_1 - B_2 A_2|_F^2 from Gram matrices of the ranks' size; the ranks may differ.

    The difference is D_B A' + B' D_A, with the differences D and the means B', A' of the factors,
    so that small differences are not what is left of large products.
    """
    rank = max(left.rank, right.rank)
    (b1, a1), (b2, a2) = (_padded(factors, rank) for factors in (left, right))
    tall = torch.cat([b1 - b2, (b1 + b2) / 2], dim=1)
    wide = torch.cat([(a1 + a2) / 2, a1 - a2], dim=0)
    return float(((tall.T @ tall) * (wide @ wide.T)).sum())


def _mean_of_best(
    updates: Sequence[Params], method: Krum | MultiKrum, m: int, now: Round
) -> dict[str, Tensor]:
    if len(updates) < method.least_updates():
        raise RoundError(
            f"Krum with f={method.f}: expected at least {method.least_updates()} updates, received "
            f"{len(updates)}. Ask more clients, or lower f in --strategy_args."
        )
    mean = RunningMean()
    for index in ranking(updates, method.f, now.scaling if method.products else None)[:m]:
        mean.add(updates[index], 1.0)
    return mean.result()


def _squared_distance(left: Params, right: Params, scaling: Mapping[str, float] | None) -> float:
    """The same bits with left and right exchanged."""
    modules = {} if scaling is None else lora_modules(left)
    pairs = [pair for pair in modules.values() if pair.a in left and pair.b in left]
    plain = set(left) - {name for pair in pairs for name in (pair.a, pair.b)}
    terms = [_plain_distance(left[name].reshape(-1), right[name].reshape(-1)) for name in plain]
    for pair in pairs:
        factors = [Factors(one[pair.b].flatten(1), one[pair.a].flatten(1)) for one in (left, right)]
        factor = (scaling or {}).get(pair.name, 1.0)
        terms.append(factor**2 * product_distance(*factors))
    return math.fsum(terms)


def _plain_distance(left: Tensor, right: Tensor) -> float:
    return math.fsum(
        float((left[part].double() - right[part].double()).square().sum())
        for part in (slice(start, start + BLOCK) for start in range(0, left.numel(), BLOCK))
    )


def _padded(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """B and A in fp64, as (out, rank) and (rank, in), filled up with zeros."""
    missing = rank - factors.rank
    b = torch.nn.functional.pad(factors.B.double(), (0, missing))
    return b, torch.nn.functional.pad(factors.A.double(), (0, 0, 0, missing))


def _content(params: Params) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(params):
        raw = params[name].detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.digest()
