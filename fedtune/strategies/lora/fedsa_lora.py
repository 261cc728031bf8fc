"""FedSA-LoRA: A learns what clients have in common, B stays personal (arXiv 2410.01463, ICLR 2025).

    A <- sum p_k A_k,   B_k stays at client k

There is no one merged model: client k uses s B_k A. The residual is that of the mean of their
updates, sum p_k s B_k A. Half the bytes of FedIT; server memory: one running sum. B is state of the
clients, who must keep it between rounds. Magnitudes of DoRA are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.strategies.base import ANY_ROUND, Properties, Round, Rule
from fedtune.strategies.lora.names import is_lora_b
from fedtune.strategies.mean import RunningMean

__all__ = ["FedSALoRA"]


@dataclass(frozen=True)
class FedSALoRA(Rule):
    """Mean of A; B does not travel."""

    properties: ClassVar[Properties] = Properties(
        personal=True, variants=frozenset({"lora", "dora"})
    )

    def travels(self, name: str) -> bool:
        """All but B."""
        return not is_lora_b(name)

    def fold(self, now: Round = ANY_ROUND) -> MeanWithoutB:
        """A mean that leaves B out."""
        return MeanWithoutB()


class MeanWithoutB(RunningMean):
    """The running mean of what is shared."""

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Fold one client's parameters in; its B, if it is there, is left out."""
        super().add({n: t for n, t in params.items() if not is_lora_b(n)}, weight)
