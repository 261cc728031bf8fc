"""raFLoRA: average each rank slice over its owners (Wu et al. 2026, arXiv 2602.13486).

    A[i] <- sum_{k: r_k > i} p_k A_k[i] / sum_{k: r_k > i} p_k      and so for B[:, i]

"Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity". Averaged with
zeros instead, a slice of owners with total share P is multiplied by P in both factors in every
round, and high ranks vanish geometrically. The paper partitions updates that are allocated by SVD;
here the slices are those that clients train, and the means are of the factors, so the mean of the
products is off by their covariance and by the other weights. With equal ranks it is FedIT.

A client of rank r_k takes the first r_k slices. One that nobody owned in this round keeps its
previous global value or starts like a fresh adapter. Server memory: clients x adapter, though sums
of slices and of their weights would do. No DoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from fedtune.strategies.base import Properties
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.product_rule import NewLayer, ProductRule, Terms, padded_mean

__all__ = ["RaFLoRA"]


@dataclass(frozen=True)
class RaFLoRA(ProductRule):
    """Means of the slices over their owners."""

    properties: ClassVar[Properties] = Properties(
        mixed_ranks=True,
        variants=frozenset({"lora"}),
    )

    def combine(self, terms: Terms) -> NewLayer:
        """Slices between two ranks that occur have the same owners."""
        pairs = list(zip(terms.factors, terms.weights, strict=True))
        bounds = sorted({0, *(factors.rank for factors in terms.factors)})
        parts = [
            padded_mean(
                (Factors(own.B[:, low:high], own.A[low:high]), weight)
                for own, weight in pairs
                if own.rank >= high
            )
            for low, high in pairwise(bounds)
        ]
        b, a = torch.cat([part.B for part in parts], 1), torch.cat([part.A for part in parts])
        return NewLayer(terms.widen(Factors(b, a)))
