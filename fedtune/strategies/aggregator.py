"""The arithmetic of a round, once for all: the server, `fedtune.aggregate`, tests, any aggregator.

    aggregation = Aggregator(method).begin(number, current, memory)
    aggregation.add(contribution)           once a client
    aggregation.finish() -> Aggregated      the new parameters, what is kept, figures

A contribution is folded as it comes, so a rule that needs only sums takes one running sum, however
many clients there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from fedtune.strategies.base import ClientStats, Round, Seen
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.mean import RunningMean, toward
from fedtune.strategies.memory import MethodState, ServerMemory, not_finite
from fedtune.strategies.method import Method
from fedtune.strategies.residuals import Certificate
from fedtune.strategies.vectors import squared_distance

__all__ = ["Aggregated", "Aggregation", "Aggregator", "Contribution", "NotFiniteError"]

Params = Mapping[str, Tensor]

MOST_RATE_TIMES = 10.0  # that the server may go as far as the client that went furthest


class NotFiniteError(Exception):
    """The server's step came to NaN or infinity; the message says where."""


@dataclass(frozen=True)
class Contribution:
    """What one client gives to a round.

    Attributes:
        params: the parameters it has trained.
        stats: what it did.
        start: the parameters it started from; None: the global ones.
        extras: name -> what its correction sends.
        age: rounds that have ended since it started.
        weight: of it in the mean; None: as the rule weighs its stats.
        squared_norm: |params - start|^2, where it is known.
    """

    params: Params
    stats: ClientStats = ClientStats(0, 0, 0)
    start: Params | None = None
    extras: Mapping[str, Params] = field(default_factory=dict)
    age: int = 0
    weight: float | None = None
    squared_norm: float | None = None


@dataclass(frozen=True)
class Aggregated:
    """What a round has come to.

    Attributes:
        params: the global parameters that have changed, or may have.
        memory: what the server keeps.
        terms: module -> what the rule adds to the base in this round.
        update_norm: |new - old|; None where ranks differ, or coordinates.
        drift: root of the weighted spread of the updates around their mean; None likewise.
        residual: of the rule, and `residual_fedavg` of FedAvg (`residuals.py`); None if not asked.
        cut_rate: how far the server went, where that was cut.
        rate: how far it would have gone.
    """

    params: dict[str, Tensor]
    memory: ServerMemory
    terms: Mapping[str, Factors]
    update_norm: float | None = None
    drift: float | None = None
    residual: float | None = None
    residual_fedavg: float | None = None
    cut_rate: float | None = None
    rate: float = 1.0


@dataclass(frozen=True)
class Aggregator:
    """Aggregates by one method.

    Attributes:
        sent_once: frozen tensors that every client has.
    """

    method: Method
    sent_once: Params = field(default_factory=dict)

    def begin(
        self,
        now: Round,
        memory: ServerMemory | None = None,
        *,
        certifies: bool = False,
        same_ranks: bool = True,
    ) -> Aggregation:
        """Begin a round.

        Args:
            now: its number, the global parameters, and the scaling and ranks of LoRA layers.
            memory: what the server keeps; None keeps nothing.
            certifies: whether to keep the factors of all updates for the residuals.
            same_ranks: whether all clients and the global parameters have the same ranks.
        """
        return Aggregation(self, now, memory, certifies=certifies, same_ranks=same_ranks)


class Aggregation:
    """Sums over the contributions to one round; `Aggregator.begin` makes it."""

    def __init__(
        self,
        aggregator: Aggregator,
        now: Round,
        memory: ServerMemory | None,
        *,
        certifies: bool,
        same_ranks: bool,
    ) -> None:
        self._method, self._sent_once = aggregator.method, aggregator.sent_once
        self._now, self._memory = now, memory
        self._fold = self._method.rule.fold(now)
        self._like: Params = {}  # of no values: their dtypes, where no global value is known
        self._extras: dict[str, RunningMean] = {}
        self._certificate = Certificate(now.scaling) if certifies else None
        # A distance has a meaning where a parameter means the same before and after the round.
        comparable = same_ranks and not self._method.properties.refactors and memory is not None
        self._spread = Spread() if comparable else None
        self._longest = 0.0
        self._stats: list[ClientStats] = []

    def add(self, one: Contribution) -> None:
        """Fold one contribution in.

        Raises:
            ManifestError: the rule cannot use it.
        """
        rule, reference = self._method.rule, self._now.reference
        weight = rule.weigh(one.stats) if one.weight is None else one.weight
        start = reference if one.start is None else one.start
        params = rule.rebase(one.params, start, reference, one.age)
        self._fold.add(params, weight)
        self._like = self._like or {name: value.new_empty(0) for name, value in one.params.items()}
        self._stats.append(one.stats)
        for name, change in one.extras.items():
            self._extras.setdefault(name, RunningMean()).add(change, rule.share(one.stats))
        if self._certificate is not None:
            self._certificate.add({**self._sent_once, **start, **params}, weight)
        known = one.squared_norm
        if known is None and (self._spread is not None or self._method.properties.needs_steps):
            known = _squared_move(one.params, start)
        self._longest = max(self._longest, math.sqrt(known or 0.0))
        if self._spread is not None:
            moved = _squared_move(params, reference) if one.age else known
            self._spread.add(moved or 0.0, weight)

    @cached_property
    def result(self) -> dict[str, Tensor]:
        """What the rule makes of the contributions; nothing can be added afterwards."""
        return self._fold.result()

    @property
    def terms(self) -> Mapping[str, Factors]:
        """Module -> what the rule adds to the base, once there is a result."""
        return getattr(self._fold, "base", {})

    def finish(self, ever: int = 0) -> Aggregated:
        """Make the server's step.

        Args:
            ever: clients that have ever taken part, or do now.

        Raises:
            NotFiniteError: something of it is NaN or infinite.
        """
        old, result = self._now.reference, self.result
        rate = self._method.rule.server_rate(self._stats)
        most = self._most_rate(rate, result)
        new, memory = self._advance(result, min(rate, most), ever)
        where = not_finite({**old, **new}, memory) if self._memory is not None else ""
        if where:
            raise NotFiniteError(where)
        cut = most if most < rate else None
        found = Aggregated(new, memory, self.terms, rate=rate, cut_rate=cut)
        if self._spread is not None:
            drift = self._spread.around(_squared_move(result, old))
            moved = math.sqrt(_squared_move({**old, **new}, old))
            found = replace(found, drift=drift, update_norm=moved)
        if self._certificate is not None:
            rounded = {name: value.to(old[name].dtype) for name, value in result.items()}
            params = {**self._sent_once, **old, **rounded}
            before = (self._memory or ServerMemory()).base
            mine, fedavg = self._certificate.residuals(params, memory.base.change_since(before))
            found = replace(found, residual=mine, residual_fedavg=fedavg)
        return found

    def _advance(
        self, result: Params, rate: float, ever: int
    ) -> tuple[dict[str, Tensor], ServerMemory]:
        method, old, memory = self._method, self._now.reference, self._memory or ServerMemory()
        new: dict[str, Tensor] = {}
        state: MethodState = {name: dict(kept) for name, kept in memory.method_state.items()}
        for name, value in toward(old, result, rate).items():
            kept = {k: one for k, one in state.get(name, {}).items() if k not in method.extras}
            new[name], state[name] = method.step(old.get(name, self._like[name]), value, kept)
        extras = self._advanced_extras(memory, ever)
        for key, tensors in extras.items():
            for name, value in tensors.items():
                state.setdefault(name, {})[key] = value
        seen = ever if any(extras.values()) else 0
        if self._memory is None:
            return new, memory
        return new, ServerMemory(state, method.rule.cumulate(memory.base, self.terms), seen)

    def _advanced_extras(self, memory: ServerMemory, ever: int) -> dict[str, dict[str, Tensor]]:
        correction = self._method.correction
        if correction is None or not correction.extras:
            return {}
        before = {name: memory.extra(name) for name in correction.extras}
        changes = {name: mean.result() for name, mean in self._extras.items()}
        seen = Seen(memory.extras_clients, ever, len(self._stats))
        return correction.advance(before, changes, seen)

    def _most_rate(self, rate: float, result: Params) -> float:
        """How far the server may go: not ten times as far as any of the clients went."""
        if rate <= 1.0 or self._memory is None:
            return math.inf
        way = math.sqrt(_squared_move(result, self._now.reference))
        return math.inf if rate * way <= self._most_way else max(1.0, self._most_way / way)

    @property
    def _most_way(self) -> float:
        return MOST_RATE_TIMES * self._longest


def _squared_move(params: Params, start: Params) -> float:
    return squared_distance({name: params[name] for name in params if name in start}, start)


class Spread:
    """Weighted spread of client updates: sum p|d_k|^2 - |sum p d_k|^2, in any order of arrival."""

    def __init__(self) -> None:
        self._squares: list[float] = []
        self._weights: list[float] = []

    def add(self, squared_norm: float, weight: float) -> None:
        """One client's update."""
        self._squares.append(weight * squared_norm)
        self._weights.append(weight)

    def around(self, squared_norm_of_mean: float) -> float:
        """Root of the spread around the mean update."""
        mean = math.fsum(self._squares) / math.fsum(self._weights)
        return math.sqrt(max(0.0, mean - squared_norm_of_mean))
