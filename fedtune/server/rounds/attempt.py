"""One attempt at a round: from decoded replies to what the server makes of them.

update -> judged (`bounds.py`) -> weighed (`weights.py`) -> folded (`aggregator.py`) -> the step
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedtune.errors import ManifestError
from fedtune.results.round_record import Refusal
from fedtune.server.rounds.bounds import Judge
from fedtune.server.rounds.check_update import finite_or_none, one_line
from fedtune.server.rounds.exchange import Arrived
from fedtune.server.rounds.norms import Record
from fedtune.server.rounds.round_result import CUT_FROM, RoundResult
from fedtune.server.rounds.weights import Scale
from fedtune.strategies.aggregator import Aggregation, Contribution, NotFiniteError
from fedtune.strategies.base import ClientStats
from fedtune.strategies.memory import ServerMemory
from fedtune.strategies.method import Method
from fedtune.transport.messages import Declared

__all__ = ["Attempt", "StepFailedError"]

log = logging.getLogger(__name__)


class StepFailedError(Exception):
    """The server's step came to nothing; the message is the reason."""


class Attempt:
    """Takes the updates as they come; `step` ends it. `outcome` says what has become of each.

    Args:
        share: of a round's weights that one client may have.
    """

    def __init__(
        self,
        method: Method,
        outcome: RoundResult,
        judge: Judge,
        aggregation: Aggregation,
        *,
        share: float,
    ) -> None:
        self._method, self._outcome = method, outcome
        self._judge, self._aggregation = judge, aggregation
        self._scale = Scale[Arrived](share if method.rule.weighs else 1.0, len(outcome.asked))
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
        weight = self._method.rule.share(update.stats)
        for ready in self._scale.put(replace(arrived, update=update), weight):
            self._fold(ready)

    def settle(self, history: Sequence[Record], declared: Mapping[str, Declared]) -> None:
        """No more will come: those who were asked in vain weigh as last, or as they declared."""
        absent = set(self._outcome.asked) - set(self._order)
        known = {name: _stats_of(declared[name]) for name in absent if name in declared}
        known |= _last_stats(history, absent)
        shares = [self._method.rule.share(stats) for stats in known.values()]
        for one, most in self._scale.settle([share for share in shares if share]):
            stats, weight = one.update.stats, self._method.rule.share(one.update.stats)
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
            self._aggregation.add(
                Contribution(
                    one.update.params,
                    one.update.stats,
                    one.start,
                    one.update.extras,
                    one.age,
                    squared_norm=one.update.squared_norm,
                )
            )
        except ManifestError as error:
            self._outcome.refused.append(Refusal(one.node, one.client, one_line(str(error))))
            log.warning("refused %s: %s", one.client, error)
            return
        self._outcome.take(one.client, one.update, one.round, cut_from)

    def step(self, known: int) -> tuple[dict[str, Tensor], ServerMemory]:
        """What has changed, and what the server keeps; figures go into the outcome.

        Args:
            known: clients that have ever taken part, or do now.

        Raises:
            StepFailedError: something of it is not finite.
        """
        outcome = self._outcome
        try:
            found = self._aggregation.finish(known)
        except NotFiniteError as error:
            raise StepFailedError(
                f"the server's step is not finite ({error}); the longest update is "
                f"{outcome.longest}"
            ) from None
        outcome.client_drift = finite_or_none(found.drift)
        outcome.update_norm = finite_or_none(found.update_norm)
        outcome.residual, outcome.residual_fedavg = found.residual, found.residual_fedavg
        outcome.server_rate = found.cut_rate
        if found.cut_rate is not None:
            log.warning(
                "the server's rate is cut from %.4g to %.4g: it would go more than ten times as "
                "far as any client",
                found.rate,
                found.cut_rate,
            )
        return found.params, found.memory


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
