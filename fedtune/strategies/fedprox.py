"""FedProx: clients are held near the global parameters (Li et al. 2020, arXiv 1812.06127).

    client:  g <- g + mu (y - x)        server: FedAvg

The gradient of mu/2 |y - x|^2, added by the client once per optimizer step
(`client/corrections.py`). Memory: one more copy of the trained parameters at the client.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.strategies.base import Correction, Method, Properties
from fedtune.strategies.settings import NOT_NEGATIVE, setting

__all__ = ["FedProx"]


@dataclass(frozen=True)
class FedProx(Method):
    """Proximal term.

    Attributes:
        mu: its strength; the paper tries 0.001 to 1.
    """

    mu: float = setting(0.01, NOT_NEGATIVE)

    properties = Properties(axis="correction")

    def correction(self) -> Correction:
        """The proximal term's gradient."""
        return Correction("fedprox", {"mu": self.mu})
