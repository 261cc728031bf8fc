"""Counts what a Trainer trains on or scores: rows and tokens of the batches it sees."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from fedtune.adapters.alone import has_virtual_tokens
from fedtune.client.batches import BatchSize, count_batch
from fedtune.client.instead import instead
from fedtune.client.score import HeldOut
from fedtune.client.undisturbed import same_rng

__all__ = ["BatchCounter", "held_out", "size_of"]

log = logging.getLogger(__name__)


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
        self._tokens: list[int | Tensor] = []
        self._losses: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return sum(int(count) for count in self._tokens)

    @property
    def loss(self) -> float:
        """Sum of the micro-batches' losses, each already divided by the accumulation steps."""
        return sum(float(loss) for loss in self._losses)

    def __enter__(self) -> BatchCounter:
        step = self._trainer.training_step

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            size = size_of(self._trainer, inputs)
            loss = step(model, inputs, *args, **kwargs)
            self.examples += size.rows
            # Kept as tensors: reading a number here could wait for the device at every step.
            self._tokens.append(size.tokens)
            self._losses.append(loss)
            if size.by_rows and self._trainer not in _told:
                _told.add(self._trainer)
                log.warning("batches have neither labels nor ids: their rows count as tokens.")
            return loss

        self._counted = instead(self._trainer, training_step=counted)
        self._counted.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._counted.__exit__(*raised)


_told: WeakSet[Trainer] = WeakSet()


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
    sizes = [size_of(trainer, batch) for batch in batches]
    return HeldOut(sum(size.rows for size in sizes), sum(int(size.tokens) for size in sizes))


def size_of(trainer: Trainer, batch: Any) -> BatchSize:
    """Rows and tokens of a batch as `trainer` takes it."""
    shifts = bool(getattr(trainer, "_loss_shifts_labels", False))
    shifts = shifts and not has_virtual_tokens(trainer.model)  # which predict a row's first token
    return count_batch(batch, shifts=shifts, padding=_padding(trainer))


def _padding(trainer: Trainer) -> int | None:
    for holder in ("data_collator", "processing_class"):
        found = getattr(getattr(trainer, holder, None), "pad_token_id", None)
        if isinstance(found, int):
            return found
    return None
