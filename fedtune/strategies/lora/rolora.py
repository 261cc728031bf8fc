"""RoLoRA: rounds take turns, one averages B over a common A, the next A (arXiv 2409.02346).

    odd rounds   B <- sum p_k B_k,   A as it is
    even rounds  A <- sum p_k A_k,   B as it is       either way  s B A = sum p_k s B_k A_k  exactly

Half the bytes of FedIT, and unlike FFA-LoRA both factors are trained in the end. Server memory: one
running sum. Which factor is common is read from the updates, so a repeated round needs no counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import ANY_ROUND, Properties, Round, Rule
from fedtune.strategies.lora.names import is_lora_a, is_lora_b, starts_random
from fedtune.strategies.lora.shared_factor import SharedFactorMean

__all__ = ["RoLoRA"]


@dataclass(frozen=True)
class RoLoRA(Rule):
    """Mean of one factor over the other, in turn."""

    properties: ClassVar[Properties] = Properties(
        products="exact", variants=frozenset({"lora", "lora_bias"})
    )

    def trains(self, name: str, server_round: int) -> bool:
        """The factor that started at 0 first, then the other; all else in every round."""
        if not (is_lora_a(name) or is_lora_b(name)):
            return True
        return starts_random(name) == (server_round % 2 == 0)

    def fold(self, now: Round = ANY_ROUND) -> SharedFactorMean:
        """A mean that insists on one common factor."""
        return SharedFactorMean("rolora", lambda name: is_lora_a(name) or is_lora_b(name))
