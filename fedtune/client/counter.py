"""Counts what a Trainer trains on or scores: examples and label tokens, from the batches it sees.

A token counts when the loss sees it: labels that are not -100; causal models shift labels, so
position 0 of a row never counts there. Preference pairs have no labels but a mask of completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from fedtune.client.undisturbed import same_rng

__all__ = ["BatchCounter", "HeldOut", "held_out"]

IGNORED = -100


class BatchCounter:
    """Counts the micro-batches of `trainer` while it is entered, and adds up their losses.

    They are read as they enter `training_step`: later a label smoother or a loss of one's own may
    take the labels out.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.examples = 0
        self._tokens: list[Tensor] = []
        self._losses: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Label tokens so far."""
        return sum(int(count) for count in self._tokens)

    @property
    def loss(self) -> float:
        """Sum of the micro-batches' losses, each already divided by the accumulation steps."""
        return sum(float(loss) for loss in self._losses)

    def __enter__(self) -> BatchCounter:
        step = self._trainer.training_step

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            counts = _count(inputs, _shifts(self._trainer))
            loss = step(model, inputs, *args, **kwargs)
            if counts is not None:
                self.examples += counts[0]
                # Kept as tensors: reading a number here could wait for the device at every step.
                self._tokens.append(counts[1])
            self._losses.append(loss)
            return loss

        vars(self._trainer)["training_step"] = counted
        return self

    def __exit__(self, *_: object) -> None:
        del vars(self._trainer)["training_step"]


class HeldOut(NamedTuple):
    """Size of a held-out set."""

    examples: int
    tokens: int


def held_out(trainer: Trainer) -> HeldOut:
    """Rows and label tokens of the trainer's eval set, or of all of them; counted only once.

    The collator decides what is a label, so the set is collated, but not run through the model.
    """
    if trainer not in _held_out:
        given = trainer.eval_dataset
        names = list(given) if isinstance(given, dict) else [None]
        with same_rng():
            counts = [_count_set(trainer, name) for name in names]
        _held_out[trainer] = HeldOut(*map(sum, zip(*counts, strict=True)))
    return _held_out[trainer]


_held_out: WeakKeyDictionary[Trainer, HeldOut] = WeakKeyDictionary()


def _count_set(trainer: Trainer, name: str | None) -> HeldOut:
    # The Trainer's loader may split the set among processes; its parts make one that does not.
    loader = trainer.get_eval_dataloader(name)
    batches = DataLoader(
        loader.dataset, trainer.args.per_device_eval_batch_size, collate_fn=loader.collate_fn
    )
    counts = [_count(batch, _shifts(trainer)) or (0, 0) for batch in batches]
    return HeldOut(sum(rows for rows, _ in counts), sum(int(tokens) for _, tokens in counts))


def _shifts(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "_loss_shifts_labels", False))


def _count(inputs: Mapping[str, Any], shifted: bool) -> tuple[int, Tensor] | None:
    """Rows and label tokens of a batch, or None when it has nothing to count."""
    labels = inputs.get("labels")
    if labels is None:
        return _count_pairs(inputs.get("completion_mask"))
    seen = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    return _rows(labels, inputs.get("position_ids")), (seen != IGNORED).sum()


def _count_pairs(mask: Tensor | None) -> tuple[int, Tensor] | None:
    """Chosen completions above, rejected ones below; a pair is one example."""
    return None if mask is None else (len(mask) // 2, mask[:, 1:].sum())


def _rows(labels: Tensor, position_ids: Tensor | None) -> int:
    """Rows of a batch; packed without padding they lie in one line, each starting at position 0."""
    if position_ids is not None and len(labels) == 1:
        return int((position_ids == 0).sum())
    return len(labels)
