"""What a run is to do: rounds, budgets, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedtune.config import FederationArguments

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        run: id of the run.
        steps: optimizer steps of a client per round, or 0 when `epochs` counts.
        epochs: passes of a client over its rows per round, or 0.
        carry: whether clients keep optimizer, scheduler, RNG and data position.
        max_failed_rounds: failures of one round that are retried; one more ends the run.
        sites_evaluate: whether each client scores the global parameters on rows of its own, so that
            they travel for it; in a simulation the pooled rows are the coordinator's.
    """

    run: str
    num_rounds: int
    steps: int
    epochs: float
    carry: bool
    seed: int
    round_timeout_s: float = 3600.0
    max_failed_rounds: int = 2
    sites_evaluate: bool = False

    @classmethod
    def of(cls, federation: FederationArguments, **others: Any) -> Plan:
        """The plan that the flags of a federation ask for."""
        steps, epochs = federation.budget
        return cls(
            num_rounds=federation.num_rounds,
            steps=steps,
            epochs=epochs,
            carry=federation.client_state == "carry",
            round_timeout_s=federation.round_timeout_s,
            max_failed_rounds=federation.max_failed_rounds,
            **others,
        )
