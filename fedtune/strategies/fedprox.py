"""FedProx: clients are held near the global parameters (Li et al. 2020, arXiv 1812.06127).

    client:  g <- g + mu (y - x)        server: FedAvg

The gradient of mu/2 |y - x|^2, added by the client once per optimizer step
(`client/corrections.py`). Memory: one more copy of the trained parameters at the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import Correction
from fedtune.strategies.settings import NOT_NEGATIVE, setting

__all__ = ["FedProx"]


@dataclass(frozen=True)
class FedProx(Correction):
    """Proximal term.

    Attributes:
        mu: its strength; the paper tries 0.001 to 1.
    """

    name: ClassVar[str] = "fedprox"

    mu: float = setting(0.01, NOT_NEGATIVE)
