"""Rounds see the rows that one `train()` sees, in its order and as its collator made them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Sampler, WeightedRandomSampler
from transformers import Trainer, default_data_collator

from fedtune.adapters import collect
from tests.federation.small import (
    ROUNDS,
    STEPS,
    arguments,
    build_model,
    run_small,
    same_tensors,
    small_rows,
    small_worker,
    training_arguments,
)

Seen = list[Any]


class Recorded(Trainer):
    """Notes what each micro-batch holds."""

    def __init__(self, seen: Seen, **given: Any) -> None:
        super().__init__(**given)
        self.seen = seen

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append({name: value.tolist() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class Lazy(Sampler[int]):
    """Draws each place when it is asked for, from all three global generators."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.rows):
            draw = random.randrange(100) + np.random.randint(100) + int(torch.randint(100, ()))
            yield draw % self.rows


class Own(Sampler[int]):
    """Has a generator of its own that goes on from epoch to epoch."""

    def __init__(self, rows: int) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(7)

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.rows, generator=self.generator).tolist()


class LazySampler(Recorded):
    def _get_train_sampler(self, *_: Any) -> Any:
        return Lazy(len(self.train_dataset))


class OwnSampler(Recorded):
    def _get_train_sampler(self, *_: Any) -> Any:
        return Own(len(self.train_dataset))


class Weighted(Recorded):
    def _get_train_sampler(self, *_: Any) -> Any:
        return WeightedRandomSampler([1.0] * len(self.train_dataset), len(self.train_dataset))


class OwnLoader(Recorded):
    """A plain torch loader, of which accelerate knows nothing."""

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_size=2, shuffle=True, collate_fn=masking
        )


def masking(rows: list[Any]) -> dict[str, Any]:
    """A collator that draws, as those for masked words do."""
    batch = default_data_collator(rows)
    hidden = torch.rand(batch["labels"].shape) < 0.3
    batch["labels"][hidden] = -100
    batch["labels"][:, -1] = random.randrange(8) + np.random.randint(8)
    return batch


def longer(rows: list[Any]) -> dict[str, Any]:
    """Pads rows of many lengths."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def ragged(rows: int) -> Any:
    def cut(row: Any, index: int) -> Any:
        length = 3 + (index * 5) % 9
        return {"input_ids": row["input_ids"][:length], "labels": row["labels"][:length]}

    return small_rows(rows).map(cut, with_indices=True)


CASES: dict[str, tuple[type[Recorded], dict[str, Any], dict[str, Any]]] = {
    "default": (Recorded, {}, {"data_collator": longer}),
    "group_by_length": (
        Recorded,
        {"train_sampling_strategy": "group_by_length"},
        {"data_collator": longer},
    ),
    "batch_rebalance": (
        Recorded,
        {"train_sampling_strategy": "batch_rebalance"},
        {"data_collator": longer},
    ),
    "lazy": (LazySampler, {}, {}),
    "own generator": (OwnSampler, {}, {}),
    "weighted": (Weighted, {}, {}),
    "drawing collator": (Recorded, {}, {"data_collator": masking}),
    "lazy and drawing": (LazySampler, {}, {"data_collator": masking}),
    "own loader": (OwnLoader, {}, {}),
    "workers": (Weighted, {"dataloader_num_workers": 1}, {}),
}


def both(directory: Path, case: str, rounds: tuple[int, int], **given: Any) -> tuple[Any, Any]:
    """What is seen, and what is trained: over rounds, and by one train()."""
    kind, settings, parts = CASES[case]
    rows = ragged(13) if "data_collator" in parts and parts["data_collator"] is longer else None
    seen: Seen = []

    def build(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Trainer:
        return kind(
            seen,
            model=model,
            args=args.training,
            train_dataset=rows or train,
            eval_dataset=evaluation,
            **parts,
        )

    number, steps = rounds
    worker = small_worker(directory / "run", build_trainer=build, **settings, **given)
    state = run_small(worker, num_rounds=number, steps=steps)
    federated = list(seen), state.params
    seen.clear()
    training = training_arguments(
        directory / "plain", max_steps=number * steps, **settings, **given
    )
    args = arguments(training, dropout=0.1)
    trainer = build(args, build_model(args)[0], None, small_rows(13), small_rows(6, seed=99))
    trainer.train()
    return federated, (seen, collect(trainer.model))


@pytest.mark.parametrize(
    ("case", "accumulation"), [*((case, 1) for case in CASES), ("lazy and drawing", 3)]
)
def test_rounds_see_what_one_train_sees(tmp_path: Path, case: str, accumulation: int) -> None:
    """Epochs of 7 batches, or 3 steps; rounds of 4 steps end inside of them. Dropout draws too."""
    (seen, params), (expected, plain) = both(
        tmp_path, case, (ROUNDS, STEPS), gradient_accumulation_steps=accumulation
    )
    assert seen == expected
    assert same_tensors(params, plain)


@pytest.mark.parametrize("case", ["default", "group_by_length", "batch_rebalance"])
def test_reset_rounds_begin_with_other_rows(tmp_path: Path, case: str) -> None:
    """Of 7 batches a round takes 2: no two rounds see the same ones, and a second run the same."""
    kind, settings, parts = CASES[case]
    first: list[Seen] = []
    for name in ("one", "two"):
        seen: Seen = []

        def build(args: Any, model: Any, *rows: Any, seen: Seen = seen) -> Trainer:
            return kind(
                seen,
                model=model,
                args=args.training,
                train_dataset=ragged(13),
                eval_dataset=rows[2],
                **parts,
            )

        worker = small_worker(tmp_path / name, build_trainer=build, **settings)
        run_small(worker, num_rounds=3, steps=2, carry=False)
        first.append(seen)
    one, two = first
    assert one == two
    rounds = [str(one[:2]), str(one[2:4]), str(one[4:])]
    assert len(one) == 6
    assert len(set(rounds)) == 3
