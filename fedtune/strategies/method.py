"""What `--strategy` names: at most one part of each axis, such as `fedprox+ffa_lora+fedadam`.

correction   what clients add to their gradients             none
rule         what travels, and how updates become one        FedAvg
optimizer    how far the server follows                      all the way
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtune.strategies.base import Correction, Properties, Rule
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.server_step import ServerOptimizer

__all__ = ["FIELDS", "Method", "Part"]

Part = Rule | Correction | ServerOptimizer
FIELDS = {"correction": "correction", "rule": "rule", "server_optimizer": "optimizer"}


@dataclass(frozen=True)
class Method:
    """A rule, and what is joined with it."""

    rule: Rule = FedAvg()
    correction: Correction | None = None
    optimizer: ServerOptimizer | None = None

    @classmethod
    def of(cls, *parts: Part) -> Method:
        """The method of these parts, at most one of each axis."""
        return cls(**{FIELDS[part.axis]: part for part in parts})  # type: ignore[arg-type]

    @property
    def properties(self) -> Properties:
        """Those of the rule: a correction or an optimizer asks for nothing of the kind."""
        return self.rule.properties

    @property
    def extras(self) -> Mapping[str, str]:
        """What travels beside the parameters, both ways: record names, and what they are called."""
        return self.correction.extras if self.correction else {}

    def step(
        self, old: Tensor, new: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Server update of one tensor, in the dtype of `old`.

        Args:
            old: the global value.
            new: the round's aggregate; of half precision it is not rounded yet.
            state: what the previous round's step returned.
        """
        if self.optimizer is None:
            return new.to(old.dtype), {}
        return self.optimizer.step(old, new, state)
