"""HetLoRA: pad to the largest rank, weigh by the update's norm (arXiv 2401.06432, EMNLP 2024).

    A <- sum w_k [A_k; 0],   B <- sum w_k [B_k, 0],   w_k = |s_k B_k A_k| / sum_j |s_j B_j A_j|

with Frobenius norms, from the factors. The paper writes w_k for one matrix: so it is here, every
layer has weights of its own. The clients' amount of data, p_k, is not in w_k, as in the paper: more
steps make a longer update already. Where all products are 0 (B = 0), w_k = p_k. Tensors beside LoRA
are averaged by p_k, and the residual is against sum p_k s_k B_k A_k.

A client of rank r_k takes the first r_k slices (row i of A, column i of B). A slice without any
weight in this round, since no such client was sampled, keeps its previous global value or starts
like a fresh adapter. One with few owners is averaged with zeros, and shrinks (`raflora.py`). Left
out: the paper's clients also prune their rank, by a penalty on its last part (gamma = .99); that is
a change of the client. Server memory: clients x adapter. No DoRA, no secure aggregation: a sum does
not know the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import Properties
from fedtune.strategies.lora.factors import norm
from fedtune.strategies.lora.product_rule import NewLayer, ProductRule, Terms, padded_mean

__all__ = ["HetLoRA"]


@dataclass(frozen=True)
class HetLoRA(ProductRule):
    """Zero-padded means, weighted by the Frobenius norms of the products."""

    properties: ClassVar[Properties] = Properties(
        sum_suffices=False,
        mixed_ranks=True,
        variants=frozenset({"lora"}),
    )

    def combine(self, terms: Terms) -> NewLayer:
        """The means by norms, over the clients whose product is not 0."""
        lengths = [(factors, norm(factors)) for factors in terms.factors]
        moved = [(factors, length) for factors, length in lengths if length > 0]
        return NewLayer(terms.widen(padded_mean(moved) if moved else terms.mean()))
