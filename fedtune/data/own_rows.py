"""Which held-out rows are like a client's own.

column      the rows with the values that it owns
dirichlet   of each value as large a share as it has of the training rows, rounded, drawn by seed

Under iid and size every client's rows are like all of them, so there is nothing to tell apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["own_rows"]

Parts = list[list[int]]


def own_rows(
    kind: str, held_out: Sequence[str], train: Sequence[Sequence[str]], *, seed: int
) -> Parts | None:
    """Indices of each client's own rows, ascending; None where rows cannot be told apart.

    Args:
        kind: of the partition.
        held_out: value of the partition column in each held-out row.
        train: the values of each client's training rows.

    own_rows("column", ["a", "b", "c"], [["a", "a"], ["b"]], seed=1) -> [[0], [1]]
    """
    if kind not in ("column", "dirichlet"):
        return None
    counts = [Counter(values) for values in train]
    rng = np.random.default_rng([seed, 2])  # a stream of its own, as that of the held-out rows
    own: Parts = [[] for _ in train]
    for value in sorted(set(held_out)):
        rows = [row for row, cell in enumerate(held_out) if cell == value]
        shares = np.array([count[value] for count in counts], dtype=float)
        if not shares.any():  # nobody trains on such rows
            continue
        ends = np.rint(np.cumsum(shares) / shares.sum() * len(rows)).astype(int)
        for part, chunk in zip(own, np.split(rng.permutation(rows), ends[:-1]), strict=True):
            part += chunk.tolist()
    return [sorted(part) for part in own]
