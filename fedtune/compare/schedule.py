"""How many optimizer steps a Trainer takes to see so many samples, known before it trains.

Its own loader is walked, epoch by epoch and step by step as `train()` does, without the model: rows
that the Trainer dropped, packed or leaves out at an epoch's end are known to nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

from transformers import Trainer

from fedtune.client.counter import size_of
from fedtune.client.loader import begin_epoch
from fedtune.client.undisturbed import same_rng

__all__ = ["steps_to_see"]


def steps_to_see(trainer: Trainer, samples: int) -> int:
    """The first optimizer step of `train()` that reaches `samples`; at least 1. No RNG is moved.

    Exact, unless the order of rows comes from the global RNG, the model draws from it as well
    (dropout), and steps differ in their samples (packing).
    """
    seen = 0
    with same_rng():
        for step, rows in enumerate(_rows_by_step(trainer), start=1):
            seen += rows
            if seen >= samples:
                return step
    raise AssertionError("a loader has no end")


def _rows_by_step(trainer: Trainer) -> Iterator[int]:
    loader = trainer.get_train_dataloader()
    accumulation = trainer.args.gradient_accumulation_steps
    for epoch in count():
        begin_epoch(loader, epoch)
        # Under accelerate's wrapper, which notes at each batch where the training is.
        batches = iter(getattr(loader, "base_dataloader", loader))
        while group := list(islice(batches, accumulation)):
            yield sum(size_of(trainer, batch).rows for batch in group)
