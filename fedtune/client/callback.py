"""The hook into a Trainer: hands its events to the `Participant`, if there is a run."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from fedtune.client.options import Options
from fedtune.client.participant import Participant
from fedtune.errors import ConfigError
from fedtune.relay.folder import RunFolder

__all__ = ["FedTuneCallback"]


class FedTuneCallback(TrainerCallback):
    """Makes a Trainer take part in a federation; outside of one it does nothing.

    `fedtune.patch(trainer, ...)` adds one. It may also be given to the Trainer itself, as
    `callbacks=[fedtune.FedTuneCallback(...)]`; then the rounds are planned when `train()` is
    called. Not with `trainer.add_callback`, of which a callback hears nothing.

    Args:
        steps_per_round: optimizer steps per round; the server's plan decides without it.
        epochs_per_round: passes over the train rows per round, instead of steps.
        reset_optimizer: whether each round begins with a fresh optimizer.
        restart_lr: whether the LR schedule spans one round and begins again with each.

    Raises:
        ConfigError: both budgets, or one that is not positive.
    """

    def __init__(
        self,
        *,
        steps_per_round: int | None = None,
        epochs_per_round: float | None = None,
        reset_optimizer: bool = False,
        restart_lr: bool = False,
    ) -> None:
        self.options = Options(steps_per_round, epochs_per_round, reset_optimizer, restart_lr)
        self.participant: Participant | None = None
        self.installed = False  # whether `train()` leads here
        self.joined = False  # whether it is known if there is a run
        self.args_before: dict[str, Any] = {}

    def on_init_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Given as `callbacks=[...]`: plan when `train()` is called."""
        from fedtune.client.patch import install  # it makes callbacks, so it imports this module

        install(_trainer_of(control), self)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the server; load the first global parameters."""
        if not self.installed and RunFolder.of_environment() is not None:
            raise ConfigError(
                "FedTuneCallback: expected fedtune.patch(trainer) or callbacks=[...], received "
                "trainer.add_callback, which is too late to plan the rounds. Use fedtune.patch."
            )
        if self.participant is not None:
            self.participant.on_train_begin(state, control)

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a round, when one was asked for."""
        if self.participant is not None:
            self.participant.on_step_begin(state, control)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add what the server's method adds to the gradients, after clipping."""
        if self.participant is not None:
            self.participant.on_pre_optimizer_step()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a round after its last optimizer step."""
        if self.participant is not None:
            self.participant.on_step_end(state, control)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Use the Trainer's own evaluation where the server asked for the same."""
        if self.participant is not None:
            self.participant.on_evaluate(state, control, metrics or {})

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as one of the run."""
        if self.participant is not None:
            self.participant.on_save(state)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End with the parameters that the server chose."""
        if self.participant is not None:
            self.participant.on_train_end(state, control)


def _trainer_of(control: TrainerControl) -> Trainer:
    """The Trainer that calls: it hands its callbacks everything but itself."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.control is control:
            return caller
        frame = frame.f_back
    raise ConfigError(
        "FedTuneCallback: expected to be called by a transformers Trainer, found none. Use "
        "fedtune.patch(trainer)."
    )
