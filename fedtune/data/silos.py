"""One data set per client, and one that nobody trains on."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data.columns import find_label_column, names_of, quoted, require_column, shown_names
from fedtune.data.duplicates import Duplicates, count_duplicates, drop_duplicates, row_keys
from fedtune.data.load import load_split
from fedtune.data.origin import select
from fedtune.data.own_rows import own_rows
from fedtune.data.partition import partition
from fedtune.errors import ConfigError, DataError, private

__all__ = ["Silos", "make_silos"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Silos:
    """Raw rows of every client and the held-out rows.

    `indices[k]` are the positions of client k's rows in the training rows (those left after the
    held-out ones, and under `--deduplicate` the duplicates, are taken). `owned[k]` are the column
    values that client k owns under `--partition column`, most rows first, and empty under the other
    kinds. `own[k]` are the positions of the held-out rows that are like client k's own
    (`own_rows.py`); None where they cannot be told apart. `duplicates` counts the equal rows among
    all of them.
    """

    train: list[Dataset]
    evaluation: Dataset
    names: list[str]
    indices: list[list[int]]
    owned: list[list[str]] = field(default_factory=list)
    own: list[list[int]] | None = None
    duplicates: Duplicates = Duplicates()

    @property
    def own_evaluation(self) -> dict[str, Dataset] | None:
        """Each client's own held-out rows by its name; None where they cannot be told apart."""
        if self.own is None:
            return None
        rows = (select(self.evaluation, part) for part in self.own)
        return dict(zip(self.names, rows, strict=True))


def make_silos(data: DataArguments, *, num_clients: int, min_rows: int, data_seed: int) -> Silos:
    """Load, hold out, then deal the other rows to `client-0`, `client-1`, ...

    Under dirichlet, warns of every client that has a single class.

    Raises:
        ConfigError: flags that do not go together.
        DataError: unreadable data, unknown columns, or an impossible partition.
    """
    rows, evaluation = load_split(data, data_seed=data_seed)
    label = find_label_column(rows.column_names, data)
    compared = label if label in evaluation.column_names else None
    keys, held_out = (row_keys(part, data, compared) for part in (rows, evaluation))
    removed: dict[str, int] = {}
    if data.deduplicate:
        kept, removed = drop_duplicates(keys, held_out)
        rows, keys = _rows_left(rows, kept), [keys[i] for i in kept]
    name = _partition_column(rows, data, label)
    values = None if name is None else names_of(rows, name)
    indices = partition(
        data.partition,
        len(rows),
        num_clients,
        values=values,
        alpha=data.partition_alpha,
        min_rows=min_rows,
        seed=data_seed,
    )
    names = [f"client-{k}" for k in range(num_clients)]
    owned: list[list[str]] = [[] for _ in indices]
    if values is not None and data.partition == "column":
        owned = [_by_frequency([values[i] for i in part]) for part in indices]
    if values is not None and data.partition == "dirichlet":
        _warn_single_class(names, indices, values)
    train = [select(rows, part) for part in indices]
    own = None
    if name is not None and values is not None and name in evaluation.column_names:
        mine = [[values[i] for i in part] for part in indices]
        own = own_rows(data.partition, shown_names(evaluation, name), mine, seed=data_seed)
    dealt = {who: [keys[i] for i in part] for who, part in zip(names, indices, strict=True)}
    duplicates = count_duplicates(dealt, held_out, removed)
    return Silos(train, evaluation, names, indices, owned, own, duplicates)


def _rows_left(rows: Dataset, kept: list[int]) -> Dataset:
    if not kept:
        raise DataError(
            f"--deduplicate: expected training rows that no held-out row is equal to, received "
            f"none: all {len(rows)} are duplicates. Fix: give other held-out rows."
        )
    return select(rows, kept)


def _partition_column(rows: Dataset, data: DataArguments, label: str | None) -> str | None:
    """The column that decides who owns a row, or None for iid and size."""
    if data.partition in ("iid", "size"):
        return None
    if data.partition_column is not None:
        return require_column(
            rows.column_names,
            data.partition_column,
            "--partition_column",
            or_else=", or deal the rows without one: --partition iid",
        )
    if data.partition == "dirichlet" and label is not None:
        return label
    raise ConfigError(
        f"--partition {data.partition}: expected --partition_column, received none"
        f"{' and no label column was found' if data.partition == 'dirichlet' else ''}. "
        f"Fix: --partition_column with one of {private(quoted(rows.column_names))}."
    )


def _by_frequency(values: list[str]) -> list[str]:
    counts = Counter(values)
    return sorted(counts, key=lambda value: (-counts[value], value))


def _warn_single_class(names: list[str], indices: list[list[int]], classes: list[str]) -> None:
    if len(set(classes)) < 2:
        return
    for name, part in zip(names, indices, strict=True):
        found = {classes[i] for i in part}
        if len(found) == 1:
            log.warning(
                "%s has a single class: all its %d rows are %r. A larger --partition_alpha or "
                "fewer clients mixes more.",
                name,
                len(part),
                found.pop(),
            )
