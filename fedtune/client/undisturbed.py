"""Work beside training, like scoring a model, that leaves no trace in the training that follows.

A data loader draws from the global RNG, `evaluate` leaves the model in eval mode, and its events
clear flags that the Trainer has just set: that a loss is to be logged, for instance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

__all__ = ["get_rng", "same_rng", "same_state", "set_rng", "silent", "undisturbed"]


def get_rng() -> dict[str, Any]:
    """State of the global generators of Python, numpy, torch and its GPUs."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng(state: dict[str, Any]) -> None:
    """Put the generators back to what `get_rng` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether nothing was drawn on the CPU between two `get_rng`."""
    return (
        torch.equal(one["torch"], other["torch"])
        and one["python"] == other["python"]
        and all(map(np.array_equal, one["numpy"], other["numpy"]))
    )


@contextmanager
def same_rng() -> Iterator[None]:
    """What is drawn inside is not missing afterwards."""
    state = get_rng()
    try:
        yield
    finally:
        set_rng(state)


@contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Keep RNG, control flags, train and eval modes, and what callbacks like early stopping count.

    The log is not kept back: what is logged inside stays in the trainer's history.
    """
    assert trainer.model is not None
    flags = asdict(trainer.control)
    modes = {module: module.training for module in trainer.model.modules()}
    counted = [
        (callback, dict(callback.state()["attributes"]))
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, ExportableState)
    ]
    try:
        with same_rng():
            yield
    finally:
        vars(trainer.control).update(flags)
        for module, mode in modes.items():
            module.training = mode
        for callback, attributes in counted:
            vars(callback).update(attributes)


@contextmanager
def silent(trainer: Trainer) -> Iterator[None]:
    """No callback and no tracker hears of what happens inside, nor does the trainer's history."""
    handler, state = trainer.callback_handler, trainer.state
    callbacks, history = handler.callbacks, list(state.log_history)
    handler.callbacks = []
    try:
        yield
    finally:
        handler.callbacks = callbacks
        state.log_history = history
