"""FedBuff: a round ends when a buffer of updates is full; late ones count less (arXiv 2106.06639).

    x <- x + sum_i p_i s(a_i) (y_i - x_i) / sum_i p_i,    s(a) = (1 + a)^-exponent

over the updates in the buffer: x_i is what client i had started from, a_i the rounds that have
ended since. Nobody waits for a slow client: its update goes into the buffer that is open when it
arrives. A client trains at most once from the same global parameters. With a buffer of all clients
and no late update it is FedAvg, bit for bit. The paper weighs equally (`--weight_by uniform`) and
takes a server learning rate, which is another axis here: `fedbuff+fedavgm`.

Server memory: one running sum, and the parameters that clients under way have started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.strategies.base import Properties, Rule
from fedtune.strategies.mean import unrounded
from fedtune.strategies.settings import COUNT, NOT_NEGATIVE, setting

__all__ = ["FedBuff"]


@dataclass(frozen=True)
class FedBuff(Rule):
    """Buffered, staleness-weighted updates.

    Attributes:
        size: updates in the buffer; 0 for half of the clients at work, rounded up.
        exponent: of the weight of a late update; 0 to count it in full.
    """

    size: int = setting(0, COUNT)
    exponent: float = setting(0.5, NOT_NEGATIVE)

    properties: ClassVar[Properties] = Properties(buffered=True)

    def buffer(self, clients: int) -> int:
        """At most as many as there are clients at work."""
        return min(int(self.size) or (clients + 1) // 2, clients)

    def rebase(
        self,
        new: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        now: Mapping[str, Tensor],
        age: int,
    ) -> Mapping[str, Tensor]:
        """Now + s(age) (new - start), so that the mean of these is the paper's step."""
        if not age:
            return new
        factor = (1 + age) ** -self.exponent
        return {
            name: (now[name].double() + factor * (value.double() - start[name].double())).to(
                unrounded(value.dtype)
            )
            if value.is_floating_point()
            else value
            for name, value in new.items()
        }
