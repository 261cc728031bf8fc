"""Rows from the hub, a file, or the corpus inside the package; and the rows held out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from fedtune.config import DataArguments
from fedtune.data.origin import first_rows, mark, select
from fedtune.data.row_files import READERS, first_line, not_empty, quiet, read_file
from fedtune.errors import ConfigError, DataError, private

__all__ = ["hold_out", "load_rows", "load_split"]


def load_split(data: DataArguments, *, data_seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows: `--eval_file`, else a share that `data_seed` alone decides.

    Raises:
        ConfigError: flags that do not go together or are out of range.
        DataError: a source that is missing, empty or unreadable.
    """
    if data.eval_file is None:
        _check_fraction(data.eval_fraction)
        return hold_out(load_rows(data), data.eval_fraction, data_seed=data_seed)
    rows = load_rows(data)
    return rows, read_file(Path(data.eval_file), "--eval_file")


def load_rows(data: DataArguments) -> Dataset:
    """All rows of `--dataset_name`, `--train_file` or the corpus inside the package, in order.

    `--max_rows N` keeps the first N.

    Raises:
        ConfigError: both sources are named, or `--max_rows` is below 1.
        DataError: the source is missing, empty or unreadable.
    """
    if data.dataset_name is not None and data.train_file is not None:
        raise ConfigError(
            "--dataset_name and --train_file: expected one source of rows, received both "
            f"({data.dataset_name}, {data.train_file}). Fix: remove one of the two."
        )
    if data.max_rows is not None and data.max_rows < 1:
        raise ConfigError(
            f"--max_rows: expected at least 1, received {data.max_rows}. Fix: raise it."
        )
    if data.dataset_name is not None:
        rows = _read_hub(data.dataset_name)
    elif data.train_file is not None:
        rows = read_file(Path(data.train_file), "--train_file")
    else:
        from fedtune.assets import CORPUS_FILE

        rows = read_file(CORPUS_FILE, "the corpus inside the package")
    return rows if data.max_rows is None else first_rows(rows, data.max_rows)


def hold_out(rows: Dataset, fraction: float, *, data_seed: int) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows), both in source order; at least one row in each.

    Raises:
        ConfigError: `fraction` is not in (0, 1).
        DataError: fewer than two rows.
    """
    _check_fraction(fraction)
    if len(rows) < 2:
        raise DataError(
            f"--eval_fraction: expected at least 2 rows to hold one out, received {len(rows)}. "
            "Fix: add rows, or name an --eval_file."
        )
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    # a stream of its own: the partition draws from the plain seed
    order = np.random.default_rng([data_seed, 1]).permutation(len(rows))
    held_out, kept = np.sort(order[:count]), np.sort(order[count:])
    return select(rows, kept.tolist()), select(rows, held_out.tolist())


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ConfigError(
            f"--eval_fraction: expected a number between 0 and 1 (both excluded), received "
            f"{fraction:g}. Fix: try 0.1, or name an --eval_file."
        )


def _read_hub(name: str) -> Dataset:
    path = Path(name)
    if path.suffix in READERS and path.exists():
        raise ConfigError(
            f"--dataset_name: expected a hub id, received the file {name}. Fix: --train_file {name}"
        )
    try:
        with quiet():
            rows: Dataset = load_dataset(name, split="train")
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        raise DataError(
            f"--dataset_name: expected a data set with a split `train`, received {name!r}: "
            f"{private(first_line(error))}. Fix: check the id and the network, or use --train_file."
        ) from error
    return mark(not_empty(rows, f"--dataset_name {name}"), name)
