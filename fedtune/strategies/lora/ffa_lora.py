"""FFA-LoRA: freeze A where it started, train and average B (Sun et al. 2024, arXiv 2403.12313).

    B <- sum p_k B_k,   A = A_0        hence  s B A = sum p_k s B_k A_0  exactly

Half the bytes, and noise on B stays linear (differential privacy, secure aggregation). Server
memory: one running sum. The frozen factor is the one that PEFT starts at random: A of a Linear, but
B of an Embedding, whose A starts at 0 and would give the other factor no gradient. A_0 is sent
once; updates that hold it must agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import ANY_ROUND, Properties, Round, Rule
from fedtune.strategies.lora.names import starts_random
from fedtune.strategies.lora.shared_factor import SharedFactorMean

__all__ = ["FFALoRA"]


@dataclass(frozen=True)
class FFALoRA(Rule):
    """Mean of B over a common A."""

    properties: ClassVar[Properties] = Properties(
        products="exact", variants=frozenset({"lora", "lora_bias"})
    )

    def trains(self, name: str, server_round: int) -> bool:
        """All but the factor that started at random."""
        return not starts_random(name)

    def fold(self, now: Round = ANY_ROUND) -> SharedFactorMean:
        """A mean that insists on a common A."""
        return SharedFactorMean("ffa_lora", starts_random)
