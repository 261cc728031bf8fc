"""What a script may say of its own rounds, in `fedtune.patch` or `FedTuneCallback`."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.errors import ConfigError

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What a script says of its own rounds.

    Raises:
        ConfigError: both budgets, or one that is not positive.
    """

    steps_per_round: int | None = None
    epochs_per_round: float | None = None
    reset_optimizer: bool = False
    restart_lr: bool = False

    def __post_init__(self) -> None:
        steps, epochs = self.steps_per_round, self.epochs_per_round
        if steps is not None and epochs is not None:
            raise ConfigError(
                f"patch: expected steps_per_round or epochs_per_round, received both ({steps} and "
                f"{epochs}). Leave one out."
            )
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ConfigError(
                f"steps_per_round: expected a whole number of at least 1, received {steps!r}. "
                "Give the optimizer steps of a round."
            )
        if epochs is not None and not 0 < epochs < float("inf"):
            raise ConfigError(
                f"epochs_per_round: expected a number above 0, received {epochs!r}. "
                "Give the passes over the rows in a round."
            )
