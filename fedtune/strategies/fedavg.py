"""FedAvg: the weighted mean of the clients' parameters (McMahan et al. 2017, arXiv 1602.05629).

    x <- sum_k p_k y_k,   p_k = w_k / sum_j w_j

Server memory: one running sum. The mean is rounded to the parameters' dtype once; nothing of it is
kept, so that K equal updates return that update. On LoRA it averages A and B apart, which is FedIT
(arXiv 2305.05644): the mean of the factors differs from that of the products by their covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import Properties, Rule

__all__ = ["FedAvg"]


@dataclass(frozen=True)
class FedAvg(Rule):
    """The mean replaces the global parameters."""

    properties: ClassVar[Properties] = Properties(combines=False)
