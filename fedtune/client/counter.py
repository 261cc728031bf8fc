"""Counts what a Trainer trains on: examples and label tokens, from the batches it really sees."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

__all__ = ["BatchCounter"]

IGNORED = -100


class BatchCounter:
    """Counts the micro-batches of `trainer` while it is entered.

    They are read as they enter `training_step`: later a label smoother or a loss of one's own may
    take the labels out. A token counts when the loss sees it: labels that are not -100; causal
    models shift labels, so position 0 of a row never counts there.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._shifted = bool(getattr(trainer, "_loss_shifts_labels", False))
        self._tokens: list[Tensor] = []
        self.examples = 0

    @property
    def tokens(self) -> int:
        """Label tokens so far."""
        return int(sum(int(count) for count in self._tokens))

    def __enter__(self) -> BatchCounter:
        step = self._trainer.training_step

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            self._count(inputs)
            return step(model, inputs, *args, **kwargs)

        vars(self._trainer)["training_step"] = counted
        return self

    def __exit__(self, *_: object) -> None:
        del vars(self._trainer)["training_step"]

    def _count(self, inputs: dict[str, Any]) -> None:
        labels = inputs.get("labels")
        if labels is None:
            return
        self.examples += _rows(labels, inputs.get("position_ids"))
        if self._shifted and labels.dim() > 1:
            labels = labels[..., 1:]
        # Kept as tensors: reading a number here could wait for the device at every step.
        self._tokens.append((labels != IGNORED).sum())


def _rows(labels: Tensor, position_ids: Tensor | None) -> int:
    """Rows of a batch; packed without padding they lie in one line, each starting at position 0."""
    if position_ids is not None and len(labels) == 1:
        return int((position_ids == 0).sum())
    return len(labels)
