"""FedEx-LoRA: average A and B, add to the base what averaging loses (arXiv 2410.09432, ACL 2025).

    A <- sum p_k A_k,   B <- sum p_k B_k,   W <- W + s (sum p_k B_k A_k - B A)

The parenthesis is the covariance sum p_k (B_k - B)(A_k - A). The p_k (B_k - B) sum to 0, so one of
them is minus the others' sum, and K - 1 terms suffice:

    sum_{k<K} p_k (B_k - B)(A_k - A_K)          rank (K - 1) r, no SVD

`rank` > 0 keeps the best approximation of that rank only (the paper's truncated variant). Server
memory: clients x adapter; every client receives the residual. Ranks have to be equal. No DoRA, no
secure aggregation, no quantized base without `cumulative.py`. Exact up to the rounding of the means
to the adapter's dtype: 1e-7 in fp32, 4e-3 in bf16.
Not for experts (`target_parameters`), aLoRA and the like, whose layers add no such product to a
fixed weight (`configs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import Properties
from fedtune.strategies.lora.factors import Factors, stack, truncate
from fedtune.strategies.lora.product_rule import BaseRule, NewLayer, Terms
from fedtune.strategies.settings import COUNT, setting

__all__ = ["FedExLoRA", "covariance"]


@dataclass(frozen=True)
class FedExLoRA(BaseRule):
    """Means plus exact residual.

    Attributes:
        max_rank: largest rank of the frozen adapter beside the base; 0 for no bound.
        tolerance: relative error that recompressing it may make in a round.
        rank: largest rank of the residual; 0 for all of it.
    """

    rank: int = setting(0, COUNT)

    properties: ClassVar[Properties] = Properties(
        sum_suffices=False,
        changes_base=True,
        products="exact",
        qlora_safe=False,
        variants=frozenset({"lora"}),
    )

    def combine(self, terms: Terms) -> NewLayer:
        """The means, and the residual as a term for the base."""
        mean = terms.mean()
        residual = covariance(terms, mean)
        if residual is not None and 0 < self.rank < residual.rank:
            residual, _ = truncate(residual, int(self.rank))
        return NewLayer(mean, residual)


def covariance(terms: Terms, mean: Factors) -> Factors | None:
    """The residual s (sum p_k B_k A_k - B A) at rank (K - 1) r; None where it is 0."""
    b, last = mean.B.double(), terms.factors[-1].A.double()
    deviations = [
        (p * terms.scaling, Factors(factors.B.double() - b, factors.A.double() - last))
        for p, factors in zip(terms.shares, terms.factors[:-1], strict=False)
    ]
    if not any(bool(d.B.any()) and bool(d.A.any()) for _, d in deviations):
        return None
    return stack(deviations)
