"""FlexLoRA: the mean update, redistributed by its SVD (Bai et al. 2024, arXiv 2402.11505).

    U S V' = sum p_k s B_k A_k
    B <- (U S^1/2)_r / s^1/2,   A <- (S^1/2 V')_r / s^1/2       hence  s B A = U_r S_r V_r'

The best update of rank r; a client of rank r_k takes the first r_k columns and rows, which is the
best of rank r_k (`ranks.resize`). r is the global rank, that of the largest client, or `rank`. With
`energy` it is the smallest that keeps that share of sum S^2, layer by layer, at most `rank` if set
and the global rank if known (nobody can hold more): FLoRIST (arXiv 2506.09199). Like it, the SVD
works on the factors and forms no (out, in) matrix. Ranks with S = 0 start like a fresh adapter, so
that they can be trained. The factors are new ones, so Adam's moments of the clients do not fit.
Server memory: clients x adapter. No DoRA, no secure aggregation.
Not for experts (`target_parameters`), whose B A is no product of a layer (`configs.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.strategies.base import Properties
from fedtune.strategies.lora.factors import Factors, Spectrum, rank_within, svd, tail
from fedtune.strategies.lora.product_rule import NewLayer, ProductRule, Terms
from fedtune.strategies.lora.ranks import pad
from fedtune.strategies.settings import COUNT, Range, setting

__all__ = ["FlexLoRA"]

PART = Range("a number >= 0 and <= 1", lambda value: 0 <= value <= 1)


@dataclass(frozen=True)
class FlexLoRA(ProductRule):
    """SVD redistribution.

    Attributes:
        rank: of the new factors (with `energy`, at most); 0 for the global one.
        energy: share of the squared singular values to keep, layer by layer; 0 for a fixed rank.
    """

    rank: int = setting(0, COUNT)
    energy: float = setting(0.0, PART)

    properties: ClassVar[Properties] = Properties(
        sum_suffices=False,
        refactors=True,
        products="to rank",
        mixed_ranks=True,
        variants=frozenset({"lora"}),
    )

    def combine(self, terms: Terms) -> NewLayer:
        """The best factors of the chosen rank."""
        spectrum = svd(terms.update())
        rank = self._rank(spectrum, terms)
        kept = spectrum.balanced(min(rank, live(spectrum)))
        root = math.sqrt(terms.scaling)
        factors = Factors(kept.B / root, kept.A / root)
        return NewLayer(pad(terms.module, factors, rank, str(terms.server_round)))

    def _rank(self, spectrum: Spectrum, terms: Terms) -> int:
        if not self.energy:
            return int(self.rank) or terms.rank
        every = len(spectrum.S)
        lost = math.sqrt(1 - self.energy) * tail(spectrum.S, 0)
        most = min(int(self.rank) or every, terms.global_rank or every)
        return max(1, min(rank_within(spectrum.S, lost), most))


def live(spectrum: Spectrum) -> int:
    """How many singular values are more than the rounding of the largest."""
    noise = torch.finfo(spectrum.S.dtype).eps * max(len(spectrum.U), spectrum.Vh.shape[1])
    return int(spectrum.S.gt(noise * spectrum.S[0]).sum())
