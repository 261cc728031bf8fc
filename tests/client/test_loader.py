"""Loaders from which nothing comes, or that could not go on after a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, default_data_collator

from fedtune.client.loader import check_loader, check_rounds
from fedtune.client.undisturbed import get_rng, same_state
from fedtune.errors import ConfigError
from tests.federation.small import arguments, build_model, small_rows, training_arguments


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(small_rows(4))


def drawing(rows: list[Any]) -> Any:
    torch.rand(1)
    return default_data_collator(rows)


def trainer(
    directory: Path, rows: Any, collate: Any = default_data_collator, **given: Any
) -> Trainer:
    training = training_arguments(directory, max_steps=2, **given)
    model = build_model(arguments(training))[0]
    return Trainer(model=model, args=training, train_dataset=rows, data_collator=collate)


@pytest.mark.parametrize(
    ("rows", "drop_last", "batches"), [(0, False, 0), (1, True, 0), (1, False, 1), (2, True, 1)]
)
def test_a_loader_has_a_batch(tmp_path: Path, rows: int, drop_last: bool, batches: int) -> None:
    given = trainer(tmp_path, small_rows(4).select(range(rows)), dataloader_drop_last=drop_last)
    before = get_rng()
    if batches:
        check_loader(given, "site-a")
    else:
        with pytest.raises(ConfigError) as caught:
            check_loader(given, "site-a")
        for words in (
            "site-a",
            f"{rows} row(s)",
            "per_device_train_batch_size 2",
            f"drop_last {drop_last}",
        ):
            assert words in str(caught.value)
    assert same_state(before, get_rng())


def test_a_stream_may_be_a_sites_but_not_a_simulations(tmp_path: Path) -> None:
    given = trainer(tmp_path, Stream())
    check_loader(given, "site-a")
    with pytest.raises(ConfigError, match="client-0: expected train rows with a length, received"):
        check_rounds(given, "client-0", carry=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_do_not_draw(tmp_path: Path, workers: int) -> None:
    given = trainer(tmp_path, small_rows(4), drawing, dataloader_num_workers=workers)
    check_rounds(given, "client-0", carry=False)
    check_rounds(trainer(tmp_path, small_rows(4), dataloader_num_workers=workers), "a", carry=True)
    if workers:
        with pytest.raises(ConfigError, match="expected --dataloader_num_workers 0, received 1"):
            check_rounds(given, "client-0", carry=True)
    else:
        check_rounds(given, "client-0", carry=True)
