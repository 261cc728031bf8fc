"""Where in its schedule a learning rate is."""

from __future__ import annotations

from torch.optim.lr_scheduler import LRScheduler

__all__ = ["set_lr_position"]

BY_METRIC = ("ReduceLROnPlateau", "GreedyLR")  # schedules that step by a metric


def set_lr_position(scheduler: LRScheduler, step: int) -> None:
    """Put a step-based schedule at `step`; one that follows a metric is left alone."""
    if type(scheduler).__name__ in BY_METRIC or scheduler.last_epoch == step:
        return
    scheduler.last_epoch = step - 1
    scheduler.step()
