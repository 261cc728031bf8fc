"""Methods of several axes as one: `fedprox+ffa_lora+fedadam`.

    correction        what clients add to their gradients        correction
    rule              what travels, how updates become one       all others
    server_optimizer  how far the server follows                 step

Each hook of `Method` belongs to one axis; an axis that is not named is FedAvg's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedtune.strategies.base import (
    ANY_ROUND,
    ClientStats,
    Correction,
    Fold,
    Method,
    Properties,
    Round,
)
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.lora.factors import Factors

__all__ = ["Combined"]


@dataclass(frozen=True)
class Combined(Method):
    """At most one method of each axis."""

    client: Method = FedAvg()
    rule: Method = FedAvg()
    server: Method = FedAvg()

    @property
    def properties(self) -> Properties:  # type: ignore[override]
        """Those of the rule, and what any of the three needs."""
        members = [member.properties for member in (self.client, self.rule, self.server)]
        return replace(
            self.rule.properties,
            axis=None,
            sum_suffices=all(member.sum_suffices for member in members),
            client_state=any(member.client_state for member in members),
        )

    def correction(self) -> Correction | None:
        """The client's."""
        return self.client.correction()

    def weigh(self, stats: ClientStats) -> float:
        """The rule's."""
        return self.rule.weigh(stats)

    def least_updates(self) -> int:
        """The rule's."""
        return self.rule.least_updates()

    def trains(self, name: str, server_round: int) -> bool:
        """The rule's."""
        return self.rule.trains(name, server_round)

    def travels(self, name: str) -> bool:
        """The rule's."""
        return self.rule.travels(name)

    def fold(self, now: Round = ANY_ROUND) -> Fold:
        """The rule's."""
        return self.rule.fold(now)

    def buffer(self, clients: int) -> int:
        """The rule's."""
        return self.rule.buffer(clients)

    def rebase(
        self,
        new: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        now: Mapping[str, Tensor],
        age: int,
    ) -> Mapping[str, Tensor]:
        """The rule's."""
        return self.rule.rebase(new, start, now, age)

    def server_rate(self, stats: Sequence[ClientStats]) -> float:
        """The rule's."""
        return self.rule.server_rate(stats)

    def cumulate(self, total: Cumulative, terms: Mapping[str, Factors]) -> Cumulative:
        """The rule's."""
        return self.rule.cumulate(total, terms)

    def step(
        self, old: Tensor, new: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The server optimizer's."""
        return self.server.step(old, new, state)
