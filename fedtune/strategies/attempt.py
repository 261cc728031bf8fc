"""One attempt at a round: from decoded replies to what the server makes of them.

update -> judged (`bounds.py`) -> weighed (`weights.py`) -> folded (`gathering.py`) -> the step
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedtune.errors import ManifestError
from fedtune.results.round_record import Refusal
from fedtune.strategies.advance import ServerMemory, advance, not_finite
from fedtune.strategies.base import ClientStats, Method
from fedtune.strategies.bounds import Judge
from fedtune.strategies.gathering import Gathering
from fedtune.strategies.norms import NORM, TIMES, Record, squared_distance
from fedtune.strategies.outcome import CUT_FROM, Outcome
from fedtune.strategies.updates import Update, finite_or_none, one_line
from fedtune.strategies.weights import Scale
from fedtune.transport.messages import Declared

__all__ = ["Arrived", "Attempt", "StepFailedError"]

log = logging.getLogger(__name__)


class StepFailedError(Exception):
    """The server's step came to nothing; the message is the reason."""


@dataclass(frozen=True)
class Arrived:
    """An update that may be folded.

    Attributes:
        start: what its client was sent.
        round: which it was trained in; `age` rounds have ended since.
    """

    client: str
    node: int
    update: Update
    start: Mapping[str, Tensor]
    round: int
    age: int


class Attempt:
    """Takes the updates as they come; `step` ends it. `outcome` says what has become of each.

    Args:
        share: of a round's weights that one client may have.
    """

    def __init__(
        self,
        method: Method,
        outcome: Outcome,
        judge: Judge,
        gathering: Gathering,
        *,
        share: float,
    ) -> None:
        self._method, self._outcome = method, outcome
        self._judge, self._gathering = judge, gathering
        self._scale = Scale[Arrived](share if method.weighs else 1.0, len(outcome.asked))
        self._share = share
        self._order: list[str] = []
        self._told = False

    @property
    def taken(self) -> int:
        """Updates that are good so far."""
        return len(self._outcome.replies) + len(self._scale)

    def take(self, arrived: Arrived) -> None:
        """Judge one; raises UpdateRefusedError."""
        update = self._judge.admit(arrived.update, arrived.start)
        self._order.append(arrived.client)
        weight = self._method.share(update.stats)
        for ready in self._scale.put(replace(arrived, update=update), weight):
            self._fold(ready)

    def settle(self, history: Sequence[Record], declared: Mapping[str, Declared]) -> None:
        """No more will come: those who were asked in vain weigh as last, or as they declared."""
        absent = set(self._outcome.asked) - set(self._order)
        known = {name: _stats_of(declared[name]) for name in absent if name in declared}
        known |= _last_stats(history, absent)
        shares = [self._method.share(stats) for stats in known.values()]
        for one, most in self._scale.settle([share for share in shares if share]):
            stats, weight = one.update.stats, self._method.share(one.update.stats)
            if weight <= most:
                self._fold(one)
                continue
            cut = replace(one.update, stats=replace(stats, most_weight=most))
            self._fold(replace(one, update=cut), cut_from=weight)
            self._say(one.client, weight, most, history)
        self._outcome.replies.sort(key=lambda reply: self._order.index(str(reply["client"])))

    def _say(self, client: str, weight: float, most: float, history: Sequence[Record]) -> None:
        """Once in a run; `rounds.jsonl` has the others."""
        before = (reply for record in history for reply in record.get("replies", ()))
        if not self._told and not any(CUT_FROM in reply for reply in before):
            log.warning(
                "%s: its weight of %.0f is cut to %.0f: where three or more are asked no client "
                "has more than %g %% of a round (--max_client_weight)",
                client,
                weight,
                most,
                100 * self._share,
            )
        self._told = True

    def _fold(self, one: Arrived, cut_from: float | None = None) -> None:
        try:
            self._gathering.add(one.update, one.start, one.age)
        except ManifestError as error:
            self._outcome.refused.append(Refusal(one.node, one.client, one_line(str(error))))
            log.warning("refused %s: %s", one.client, error)
            return
        self._outcome.take(one.client, one.update, one.round, cut_from)

    def step(
        self,
        old: Mapping[str, Tensor],
        static: Mapping[str, Tensor],
        memory: ServerMemory,
        known: int,
    ) -> tuple[dict[str, Tensor], ServerMemory]:
        """The new global parameters, and what the server keeps; figures go into the outcome.

        Args:
            static: frozen tensors that every client has.
            known: clients that have ever taken part, or do now.

        Raises:
            StepFailedError: something of it is not finite.
        """
        gathering, outcome = self._gathering, self._outcome
        result = gathering.fold.result()
        rate = self._rate(result, old)
        new, after = advance(self._method, old, memory, gathering, result, clients=known, rate=rate)
        where = not_finite(new, after)
        if where:
            raise StepFailedError(
                f"the server's step is not finite ({where}); the longest update is "
                f"{outcome.longest}"
            )
        added = after.base.change_since(memory.base)
        if gathering.spread is not None:
            drift = gathering.spread.around(squared_distance(result, old))
            outcome.client_drift = finite_or_none(drift)
            outcome.update_norm = finite_or_none(math.sqrt(squared_distance(new, old)))
        if gathering.certificate is not None:
            rounded = {name: value.to(old[name].dtype) for name, value in result.items()}
            errors = gathering.certificate.residuals({**static, **old, **rounded}, added)
            outcome.residual, outcome.residual_fedavg = errors
        return new, after

    def _rate(self, result: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> float:
        """How far to go: not ten times as far as any of the clients went."""
        rate = self._method.server_rate(self._gathering.stats)
        if rate <= 1.0:
            return rate
        way = math.sqrt(squared_distance(result, old))
        most = TIMES * max(float(reply[NORM] or 0.0) for reply in self._outcome.replies)
        if rate * way <= most:
            return rate
        self._outcome.server_rate = max(1.0, most / way)
        log.warning(
            "the server's rate is cut from %.4g to %.4g: it would go more than ten times as far as "
            "any client",
            rate,
            self._outcome.server_rate,
        )
        return self._outcome.server_rate


def _stats_of(most: Declared) -> ClientStats:
    steps = most.steps
    return ClientStats(steps * most.rows_per_step, steps * most.tokens_per_step, steps)


def _last_stats(history: Sequence[Record], clients: Collection[str]) -> dict[str, ClientStats]:
    """What clients did in the last of the finished rounds that took an update of theirs."""
    if not clients:
        return {}
    return {
        reply["client"]: ClientStats(reply["examples"], reply["tokens"], reply["steps"])
        for record in history
        for reply in record.get("replies", ())
        if reply["client"] in clients
    }
