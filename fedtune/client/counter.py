"""Counts what a model is trained on: examples and label tokens, from the batches it really sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BatchCounter"]

IGNORED = -100


class BatchCounter:
    """Counts training batches of `model` while it is entered.

    A token counts when the loss sees it: labels that are not -100; causal models shift labels, so
    position 0 of a row never counts there. Evaluation batches do not count.
    """

    def __init__(self, model: nn.Module, *, shifted: bool) -> None:
        self._model = model
        self._shifted = shifted
        self._tokens: list[Tensor] = []
        self.examples = 0

    @property
    def tokens(self) -> int:
        """Label tokens so far."""
        return int(sum(int(count) for count in self._tokens))

    def __enter__(self) -> BatchCounter:
        self._hook = self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _count(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if not model.training or not torch.is_grad_enabled() or labels is None:
            return
        self.examples += _rows(labels, kwargs.get("position_ids"))
        if self._shifted and labels.dim() > 1:
            labels = labels[..., 1:]
        # Kept as tensors: reading a number here would wait for the device at every step.
        self._tokens.append((labels != IGNORED).sum())


def _rows(labels: Tensor, position_ids: Tensor | None) -> int:
    """Rows of a batch; packed without padding they lie in one line, each starting at position 0."""
    if position_ids is not None and len(labels) == 1:
        return int((position_ids == 0).sum())
    return len(labels)
