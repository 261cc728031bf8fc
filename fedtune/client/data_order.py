"""Rounds see the rows that one `train()` would see, whatever their order is drawn from.

A Trainer that resumes skips the batches it has seen. It draws their order anew, before it puts the
global RNG back, and collates one batch again that it had fetched ahead. So the RNG is noted at the
fetches that need it, and put back at each of them:

    first of the epoch, wherever a sampler drew more    the order
    fetched, but not trained on at the round's end      rows and collators that draw
    first after the round's end                         the Trainer's own checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler
from transformers import Trainer

from fedtune.client.instead import instead
from fedtune.client.loader import samplers_of
from fedtune.client.undisturbed import get_rng, same_rng, same_state, set_rng
from fedtune.errors import ConfigError

__all__ = ["continued", "fresh"]

FILE = "fedtune_data.pt"
KNOWN = ("accelerate", "torch", "transformers")  # their samplers keep nothing from epoch to epoch

Rng = dict[str, Any]


@dataclass
class Place:
    """Where a loader is, between two fetches.

    Attributes:
        inside: whether the epoch has steps left.
        fetched: batches of the epoch taken from its sampler.
        before: RNG before the fetch of some of them.
        earlier: `before` of each earlier epoch, where a sampler's own state has to be made again.
    """

    inside: bool = False
    fetched: int = 0
    before: dict[int, Rng] = field(default_factory=dict)
    earlier: list[dict[int, Rng]] = field(default_factory=list)


class _Noted(BatchSampler):
    """A batch sampler that notes where it is, and begins where another one was.

    Args:
        ahead: most batches that are fetched before they are trained on.
        go_on: puts the RNG to where it was at `place`.
        turn: added to the number of every epoch.
    """

    def __init__(
        self, inner: Any, ahead: int, place: Place, go_on: Callable[[], None], turn: int = 0
    ) -> None:
        self._inner, self._ahead, self._turn = inner, ahead, turn
        self._begin, self._go_on = place, go_on
        self._told: int | None = None
        self.place = Place(earlier=list(place.earlier))

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    @property
    def sampler(self) -> Any:  # type: ignore[override]
        """This one: accelerate looks here for what has to know the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Pass the number of the epoch on."""
        self._told = epoch
        self._tell(epoch)

    def _tell(self, epoch: int) -> None:
        for part in samplers_of(self._inner):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch + self._turn)

    def __iter__(self) -> Iterator[list[Any]]:
        begin, self._begin = self._begin, Place()
        if begin.earlier:
            self._repeat(begin.earlier)
        now = self.place = Place(earlier=self.place.earlier)
        batches = iter(self._inner)
        drawn = {0}
        for number in count():
            if begin.inside:
                if number in begin.before:
                    set_rng(begin.before[number])
                if number == begin.fetched:
                    self._go_on()
            now.before[number] = rng = get_rng()
            batch = next(batches, None)
            if not same_state(rng, get_rng()):
                drawn.add(number)
            if number - self._ahead not in drawn:
                now.before.pop(number - self._ahead, None)
            if batch is None:
                break
            now.fetched = number + 1
            yield batch
        if not _forgetful(self._inner):
            now.earlier.append({number: now.before[number] for number in drawn})

    def _repeat(self, earlier: list[dict[int, Rng]]) -> None:
        """Let the sampler draw the epochs that another process has had from it."""
        with same_rng():
            for epoch, before in enumerate(earlier):
                self._tell(epoch)
                batches = iter(self._inner)
                for number in count():
                    if number in before:
                        set_rng(before[number])
                    if next(batches, None) is None:
                        break
        if self._told is not None:
            self._tell(self._told)


@contextmanager
def continued(trainer: Trainer, checkpoint: Path | None) -> Iterator[Callable[[Path], None]]:
    """Let `trainer.train(checkpoint)` go on with the rows; yields what notes where it got to."""
    load_rng = trainer._load_rng_state
    place = Place() if checkpoint is None else _read(checkpoint / FILE)

    def go_on() -> None:
        load_rng(None if checkpoint is None else str(checkpoint))

    def load_between_epochs(directory: str | None) -> None:
        if not place.inside:
            load_rng(directory)

    with (
        _noted(trainer, place, go_on) as made,
        instead(trainer, _load_rng_state=load_between_epochs),
    ):
        yield lambda directory: _write(directory / FILE, _reached(trainer, made[0]))


@contextmanager
def fresh(trainer: Trainer, turn: int) -> Iterator[None]:
    """Let each `turn` have an order of its own where it depends on the number of the epoch."""
    with _noted(trainer, Place(), lambda: None, turn):
        yield


@contextmanager
def _noted(
    trainer: Trainer, place: Place, go_on: Callable[[], None], turn: int = 0
) -> Iterator[list[_Noted]]:
    """Put a `_Noted` into every train loader; yields the list of them."""
    make = trainer.get_train_dataloader
    made: list[_Noted] = []

    def noted() -> Any:
        loader = make()
        base = getattr(loader, "base_dataloader", loader)
        ahead = 2 + base.num_workers * (base.prefetch_factor or 0)
        name = "sampler" if base.batch_sampler is None else "batch_sampler"
        made.append(_Noted(getattr(base, name), ahead, place, go_on, turn))
        vars(base)[name] = made[-1]  # a loader lets nobody set it
        return loader

    with instead(trainer, get_train_dataloader=noted):
        yield made


def _reached(trainer: Trainer, noted: _Noted) -> Place:
    steps = max(1, -(-len(noted) // trainer.args.gradient_accumulation_steps))
    noted.place.inside = trainer.state.global_step % steps != 0
    return noted.place


def _forgetful(batch_sampler: Any) -> bool:
    """Whether an epoch depends on its number and the global RNG alone."""
    return all(
        isinstance(part, SeedableRandomSampler)
        or (
            type(part).__module__.split(".")[0] in KNOWN
            and getattr(part, "generator", None) is None
        )
        for part in samplers_of(batch_sampler)
    )


def _write(file: Path, place: Place) -> None:
    torch.save(
        {
            "inside": place.inside,
            "fetched": place.fetched,
            "before": {number: _plain(rng) for number, rng in place.before.items()},
            "earlier": [
                {number: _plain(rng) for number, rng in before.items()} for before in place.earlier
            ],
        },
        file,
    )


def _read(file: Path) -> Place:
    if not file.is_file():
        raise ConfigError(
            f"client state: expected {file}, found none: another version of fedtune wrote the "
            "rest. Start again with --overwrite."
        )
    read = torch.load(file, weights_only=True)
    return Place(
        inside=read["inside"],
        fetched=read["fetched"],
        before={number: _rng(plain) for number, plain in read["before"].items()},
        earlier=[
            {number: _rng(plain) for number, plain in before.items()} for before in read["earlier"]
        ],
    )


def _plain(rng: Rng) -> Rng:
    """Without numpy's arrays, which `weights_only` does not load."""
    kind, key, *rest = rng["numpy"]
    return {**rng, "numpy": (kind, torch.from_numpy(key.astype(np.int64)), *rest)}


def _rng(plain: Rng) -> Rng:
    kind, key, *rest = plain["numpy"]
    return {**plain, "numpy": (kind, key.numpy().astype(np.uint32), *rest)}
