"""FedNova: no client counts more because it took more steps (Wang et al. 2020, arXiv 2007.07481).

    x <- x + tau_eff sum_k p_k (y_k - x) / |a_k|,   tau_eff = sum_k p_k |a_k|

|a_k| is how far client k would go if all its gradients were 1, in units of its learning rate. Under
AdamW, which has no such linear form, it is the number of optimizer steps. The server works with

    mean = weighted mean with weights p_k / |a_k|,   x <- x + rate (mean - x),
    rate = (sum_k p_k |a_k|) (sum_k p_k / |a_k|) >= 1

which is the same, needs one running sum only, and is FedAvg where all |a_k| are equal: no use then.
Limits: the server knows steps, not learning rates, so a schedule counts as constant within a round;
momentum is taken to start at zero in each round (`--client_state reset`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat

from fedtune.strategies.base import ClientStats, Properties, Rule
from fedtune.strategies.settings import SHARE, setting

__all__ = ["FedNova", "path_length"]


@dataclass(frozen=True)
class FedNova(Rule):
    """Normalised averaging.

    Attributes:
        client_momentum: momentum of the clients' SGD; 0 for AdamW and plain SGD.
        prox: learning rate times mu of the clients' FedProx under SGD; 0 without.
    """

    client_momentum: float = setting(0.0, SHARE)
    prox: float = setting(0.0, SHARE)

    properties = Properties(needs_steps=True)

    def weigh(self, stats: ClientStats) -> float:
        """p_k / |a_k|."""
        return self.share(stats) / self._length(stats)

    def server_rate(self, stats: Sequence[ClientStats]) -> float:
        """(sum p |a|) (sum p / |a|), of rational numbers: 1 exactly where all |a_k| are equal."""
        pairs = [(Fraction(self.share(one)), Fraction(self._length(one))) for one in stats]
        total = sum(share for share, _ in pairs)
        forth = sum(share * length for share, length in pairs)
        back = sum(share / length for share, length in pairs)
        return float(forth * back / total**2)

    def _length(self, stats: ClientStats) -> float:
        if not self.client_momentum and not self.prox:
            return float(stats.num_steps)
        return path_length(
            repeat(1.0, stats.num_steps), momentum=self.client_momentum, prox=self.prox
        )


def path_length(rates: Iterable[float], *, momentum: float = 0.0, prox: float = 0.0) -> float:
    """|a|: how far SGD goes when every gradient is 1.

    Closed forms, at rate 1: tau; [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho) with momentum
    rho; (1 - (1 - prox)^tau) / prox with a proximal term.

    Args:
        rates: learning rate of each step, in units of the round's first.
        momentum: of the optimizer.
        prox: mu of the proximal term times the unit of the rates.
    """
    position = velocity = 0.0
    for rate in rates:
        velocity = momentum * velocity + 1.0 - prox * position
        position += rate * velocity
    return position
