"""What a Trainer's train loader is made of, and whether anything comes out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer

from fedtune.client.undisturbed import get_rng, same_rng, same_state
from fedtune.errors import ConfigError

__all__ = ["begin_epoch", "check_loader", "check_rounds", "samplers_of"]


def begin_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader its epoch, as `Trainer.train` does before each pass over it."""
    parts: list[Any] = [loader, getattr(getattr(loader, "batch_sampler", None), "batch_sampler", 0)]
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def samplers_of(batch_sampler: Any) -> Iterator[Any]:
    """A batch sampler and the samplers inside of it, from the outside."""
    part = batch_sampler
    while part is not None:
        yield part
        part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)


def check_loader(trainer: Trainer, client: str) -> None:
    """Raise ConfigError where a Trainer has rows or lines, or none, but no batch of them."""
    rows: Any = trainer.train_dataset
    if not hasattr(rows, "__len__"):
        return
    batches = 0
    if len(rows):
        with same_rng():
            loader = trainer.get_train_dataloader()
        try:
            batches = len(loader)
        except TypeError:
            return
    if batches:
        return
    args = trainer.args
    raise ConfigError(
        f"{client}: expected at least one batch to train on, received {len(rows)} row(s) in "
        f"its Trainer, per_device_train_batch_size {args.per_device_train_batch_size} and "
        f"dataloader_drop_last {args.dataloader_drop_last}. Give it more rows, or change one of "
        "the two."
    )


def check_rounds(trainer: Trainer, client: str, *, carry: bool) -> None:
    """Raise ConfigError where a Trainer that stops after a round could not go on with its rows.

    `carry`: whether it goes on where it was.
    """
    rows: Any = trainer.train_dataset
    if isinstance(rows, IterableDataset):
        raise ConfigError(
            f"{client}: expected train rows with a length, received a stream, of which every round "
            "of a simulation would begin anew. Load the rows, or use fedtune.patch in a script of "
            "your own, whose one train() goes on."
        )
    if carry and trainer.args.dataloader_num_workers and _draws(trainer):
        raise ConfigError(
            f"{client}: expected --dataloader_num_workers 0, received "
            f"{trainer.args.dataloader_num_workers} with rows or a collator that draw random "
            "numbers: workers begin theirs anew in every round. Leave it out."
        )


def _draws(trainer: Trainer) -> bool:
    """Whether making a batch moves a global RNG."""
    with same_rng():
        loader: Any = trainer.get_train_dataloader()
        places = next(iter(getattr(loader, "base_dataloader", loader).batch_sampler))
        before = get_rng()
        loader.collate_fn([loader.dataset[place] for place in places])
        return not same_state(before, get_rng())
