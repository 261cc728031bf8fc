"""Who owns which row: pure, seeded, numpy only.

Laws of every kind: each index exactly once, every client at least `min_rows`, and the same lists
for the same seed. Within a client the indices are ascending, so rows keep their source order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError, DataError

__all__ = ["KINDS", "column", "deal_values", "dirichlet", "iid", "partition", "size"]

KINDS = ("iid", "dirichlet", "column", "size")

log = logging.getLogger(__name__)

Values = Sequence[Hashable]
Parts = list[list[int]]


def partition(
    kind: str,
    num_rows: int,
    num_clients: int,
    *,
    values: Values | None = None,
    alpha: float = 0.5,
    min_rows: int = 1,
    seed: int = 42,
) -> Parts:
    """Row indices of each client, by `kind`; `values` has one entry per row.

    partition("column", 4, 2, values=["a", "b", "a", "a"]) -> [[0, 2, 3], [1]]

    Raises:
        ConfigError: unknown kind, or a setting out of range.
        DataError: these rows cannot be dealt so that every client gets `min_rows`.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"--partition: expected one of {', '.join(KINDS)}, received {kind!r}. "
            "Fix: choose one of them."
        )
    _check_sizes(num_rows, num_clients, min_rows)
    if kind == "iid":
        return iid(num_rows, num_clients, seed=seed)
    if kind == "size":
        return size(num_rows, num_clients, min_rows=min_rows, seed=seed)
    if values is None or len(values) != num_rows:
        raise DataError(
            f"--partition {kind}: expected one value per row ({num_rows}), received "
            f"{'none' if values is None else len(values)}. Fix: name a column of the rows with "
            "--partition_column."
        )
    if kind == "column":
        return column(values, num_clients, min_rows=min_rows)
    return dirichlet(values, num_clients, alpha=alpha, min_rows=min_rows, seed=seed)


def iid(num_rows: int, num_clients: int, *, seed: int) -> Parts:
    """Shuffled rows, cut into parts whose sizes differ by one row at most."""
    order = np.random.default_rng(seed).permutation(num_rows)
    return [_ascending(part) for part in np.array_split(order, num_clients)]


def size(num_rows: int, num_clients: int, *, min_rows: int, seed: int) -> Parts:
    """Shuffled rows, cut in proportion to 1, 2, ..., K.

    A client that would stay below `min_rows` is filled up from the largest client.
    """
    shares = np.cumsum(np.arange(1, num_clients + 1))
    sizes = np.diff(num_rows * shares // shares[-1], prepend=0)
    while sizes.min() < min_rows:
        sizes[sizes.argmin()] += 1
        sizes[sizes.argmax()] -= 1
    order = np.random.default_rng(seed).permutation(num_rows)
    return [_ascending(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def dirichlet(values: Values, num_clients: int, *, alpha: float, min_rows: int, seed: int) -> Parts:
    """Skewed mix: client shares of each value are drawn from Dirichlet(alpha, ..., alpha).

    Drawn once, so that the mix is as skewed as alpha says. Clients below `min_rows` are then filled
    up with rows of the largest, and how many is a warning. Hsu et al., arXiv 1909.06335.

    Raises:
        ConfigError: alpha is not a positive number.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(
            f"--partition_alpha: expected a number above 0, received {alpha}. Fix: try 0.5."
        )
    rng = np.random.default_rng(seed)
    groups = [np.array(rows) for rows in _rows_by_value(values).values()]
    # (values, clients): the number of rows of each value that each client gets
    counts = np.array(
        [rng.multinomial(len(g), rng.dirichlet([alpha] * num_clients)) for g in groups]
    )
    few = int((counts.sum(axis=0) < min_rows).sum())
    moved = _fill(counts, min_rows, rng)
    if moved:
        log.warning(
            "--partition dirichlet: %d of %d clients drew fewer than %d rows; %d rows (%.2g %%) of "
            "the largest were moved to them. A larger --partition_alpha or fewer clients moves "
            "less.",
            few,
            num_clients,
            min_rows,
            moved,
            100 * moved / len(values),
        )
    return _deal_counts(groups, counts, rng)


def _fill(counts: NDArray[np.int64], min_rows: int, rng: np.random.Generator) -> int:
    """Fill every column up to `min_rows` from the largest, in place; returns how many rows moved.

    What moves has the mix of the client that gives. Possible when all rows are enough for all.
    """
    moved = 0
    while (sizes := counts.sum(axis=0)).min() < min_rows:
        smallest, largest = sizes.argmin(), sizes.argmax()
        second = np.partition(sizes, -2)[-2]
        wanted = min(min_rows - sizes[smallest], max(1, sizes[largest] - second))
        rows = rng.multivariate_hypergeometric(counts[:, largest], wanted)
        counts[:, largest] -= rows
        counts[:, smallest] += rows
        moved += int(wanted)
    return moved


def column(values: Values, num_clients: int, *, min_rows: int = 1) -> Parts:
    """Rows stay with their value: each value belongs to one client.

    Raises:
        DataError: fewer distinct values than clients, or a client below `min_rows`.
    """
    rows = _rows_by_value(values)
    if len(rows) < num_clients:
        raise DataError(
            f"--partition column: expected at least {num_clients} distinct values (one per "
            f"client), received {len(rows)}. Fix: lower --num_clients to {len(rows)}, or choose "
            "another --partition_column."
        )
    owned = deal_values({value: len(found) for value, found in rows.items()}, num_clients)
    parts = [sorted(i for value in mine for i in rows[value]) for mine in owned]
    smallest = min(range(num_clients), key=lambda k: len(parts[k]))
    if len(parts[smallest]) < min_rows:
        raise DataError(
            f"--partition column: expected {min_rows} rows for every client, received "
            f"{len(parts[smallest])} for client {smallest}. Fix: lower --min_rows or --num_clients."
        )
    return parts


def deal_values(counts: dict[Hashable, int], num_clients: int) -> list[list[Hashable]]:
    """Values by falling number of rows (ties by name), each to the client with fewest rows so far.

    deal_values({"a": 5, "b": 3, "c": 3}, 2) -> [["a"], ["b", "c"]]
    """
    owned: list[list[Hashable]] = [[] for _ in range(num_clients)]
    totals = [0] * num_clients
    for value in sorted(counts, key=lambda v: (-counts[v], str(v))):
        smallest = totals.index(min(totals))
        owned[smallest].append(value)
        totals[smallest] += counts[value]
    return owned


def _check_sizes(num_rows: int, num_clients: int, min_rows: int) -> None:
    for flag, number in (("--num_clients", num_clients), ("--min_rows", min_rows)):
        if number < 1:
            raise ConfigError(f"{flag}: expected at least 1, received {number}. Fix: raise it.")
    if num_clients > num_rows:
        raise DataError(
            f"--num_clients: expected at most one client per row ({num_rows} rows), received "
            f"{num_clients}. Fix: lower --num_clients or add rows."
        )
    if num_clients * min_rows > num_rows:
        raise DataError(
            f"--min_rows: {num_clients} clients x {min_rows} rows need {num_clients * min_rows} "
            f"rows, received {num_rows}. Fix: lower --min_rows (default: one batch) or "
            "--num_clients, or add rows."
        )


def _rows_by_value(values: Values) -> dict[Hashable, list[int]]:
    """Indices of each value, values in order of their name."""
    rows: dict[Hashable, list[int]] = {}
    for i, value in enumerate(values):
        rows.setdefault(value, []).append(i)
    return dict(sorted(rows.items(), key=lambda item: str(item[0])))


def _deal_counts(
    groups: list[NDArray[np.int64]], counts: NDArray[np.int64], rng: np.random.Generator
) -> Parts:
    """Hand out each group's rows in seeded order; counts: (groups, clients)."""
    parts: Parts = [[] for _ in range(counts.shape[1])]
    for group, wanted in zip(groups, counts, strict=True):
        for part, chunk in zip(
            parts, np.split(rng.permutation(group), np.cumsum(wanted)[:-1]), strict=True
        ):
            part.extend(chunk.tolist())
    return [sorted(part) for part in parts]


def _ascending(part: NDArray[np.int64]) -> list[int]:
    return [int(i) for i in np.sort(part)]
