"""What a run changes in a live Trainer: its end, its schedule, its place, a spoiled optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerState

from fedtune.adapters.sharded import is_sharded, local_part
from fedtune.client.instead import instead
from fedtune.client.local import model_of
from fedtune.client.lr_position import set_lr_position
from fedtune.client.ranks import Ranks

__all__ = [
    "endless",
    "move_to",
    "optimizer_is_spoiled",
    "restart_schedule",
    "schedule",
    "weightless",
]


@contextmanager
def endless(trainer: Trainer, planned: Callable[[int], None]) -> Iterator[None]:
    """Epochs without end: the run's rounds end the training, even when some are repeated.

    `planned` is told how many there would have been.
    """
    values = trainer.set_initial_training_values

    def without_end(*args: Any, **kw: Any) -> tuple[Any, ...]:
        epochs, *others = values(*args, **kw)
        planned(epochs)
        return sys.maxsize, *others

    with instead(trainer, set_initial_training_values=without_end):
        yield


@contextmanager
def schedule(trainer: Trainer, steps: int | None) -> Iterator[None]:
    """The LR schedule spans so many steps; None: the whole run."""
    create = trainer.create_scheduler

    def of_one_round(num_training_steps: int, *args: Any, **kw: Any) -> Any:
        return create(steps, *args, **kw)  # type: ignore[arg-type]

    overrides = {} if steps is None else {"create_scheduler": of_one_round}
    with instead(trainer, **overrides):
        yield


def restart_schedule(trainer: Trainer) -> None:
    """To its first step."""
    trainer.lr_scheduler.last_epoch = -1  # type: ignore[union-attr]
    trainer.lr_scheduler.step()  # type: ignore[union-attr]


@contextmanager
def weightless(trainer: Trainer, checkpoint: str | None) -> Iterator[None]:
    """Leave the weights of our own checkpoint alone: PEFT's files do not hold every method's."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    overrides = {"_load_from_checkpoint": nothing} if checkpoint else {}
    with instead(trainer, **overrides):
        yield


def move_to(trainer: Trainer, state: TrainerState, step: int, *, schedule: bool) -> None:
    """Go on at another step of the run; `schedule`: the LR too."""
    moved = step - state.global_step
    state.global_step = step
    # From these the Trainer works out over how many steps a loss is a mean.
    for name in ("_globalstep_last_logged", "_initial_global_step"):
        vars(trainer)[name] += moved
    if schedule:
        set_lr_position(trainer.lr_scheduler, step)  # type: ignore[arg-type]


def optimizer_is_spoiled(trainer: Trainer, ranks: Ranks) -> bool:
    """Whether NaN or Inf is left in it, on any process, by a gradient that was none.

    Good parameters from the server would not cure that: the next step spoils them again.
    """
    states = trainer.optimizer.state.values()  # type: ignore[union-attr]
    tensors = [value for state in states for value in state.values()]
    bad = any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not bool(local_part(value).isfinite().all())
        for value in tensors
    )
    if is_sharded(model_of(trainer)):  # else every process has the same state
        bad = bool(ranks.total([float(bad)])[0])
    return bad
