"""FedIT: average A and B, each for itself (Zhang et al. 2023, arXiv 2305.05644).

    A <- sum p_k A_k,   B <- sum p_k B_k

The baseline. The mean of the factors is not the mean of the products: it is off by their covariance
sum p_k (B_k - B)(A_k - A). Server memory: one running sum. Works for every kind of LoRA, DoRA's
magnitudes included; ranks have to be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import Properties, Rule

__all__ = ["FedIT"]


@dataclass(frozen=True)
class FedIT(Rule):
    """FedAvg on LoRA factors."""

    properties: ClassVar[Properties] = Properties(variants=frozenset({"lora", "dora", "lora_bias"}))
