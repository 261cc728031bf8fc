"""Equal rows: held-out rows that are trained on, rows that repeat, rows that clients share.

Rows are compared by what is learned from: the columns of their format (`detect`), for texts the
label too, otherwise all columns but identifiers. Two cells are equal when their texts are, without
the white space at both ends; lists and objects are compared item by item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data.detect import row_format
from fedtune.errors import DataError

__all__ = ["ClientDuplicates", "Duplicates", "count_duplicates", "drop_duplicates", "row_keys"]

BATCH = 1_000
IDENTIFIERS = ("id", "idx", "index", "uuid")


@dataclass(frozen=True)
class ClientDuplicates:
    """One client: held-out rows that it has too, and rows that repeat an earlier one of its own."""

    held_out: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Duplicates:
    """Equal rows of a run.

    Attributes:
        held_out_rows: all held-out rows.
        held_out: those of them that at least one client trains on.
        held_out_repeated: held-out rows that repeat an earlier held-out row.
        clients: counts of each client.
        shared: distinct rows that more than one client has.
        removed: training rows that `--deduplicate` has taken out, by reason.
    """

    held_out_rows: int = 0
    held_out: int = 0
    held_out_repeated: int = 0
    clients: Mapping[str, ClientDuplicates] = field(default_factory=dict)
    shared: int = 0
    removed: Mapping[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """What there is to say, the word "duplicate" in every sentence; none without any."""
        said = []
        if any(self.removed.values()):
            reasons = " and ".join(f"{n:,} {why}" for why, n in self.removed.items() if n)
            said.append(f"duplicates taken out of training: {reasons}")
        if self.held_out:
            said.append(
                f"{self.held_out:,} of {self.held_out_rows:,} held-out rows are training rows too, "
                f"duplicates ({self._by_client('held_out')}): their loss is no held-out loss. "
                "--deduplicate takes them out of training"
            )
        repeated = self._by_client("repeated")
        if repeated:
            said.append(f"training rows that repeat another row of their client, duplicates: "
                        f"{repeated}")  # fmt: skip
        if self.shared:
            said.append(f"{self.shared:,} rows are duplicates of several clients: each has them")
        if self.held_out_repeated:
            said.append(f"{self.held_out_repeated:,} of {self.held_out_rows:,} held-out rows "
                        "repeat another held-out row, duplicates")  # fmt: skip
        return said

    def _by_client(self, name: str) -> str:
        counts = {client: getattr(own, name) for client, own in self.clients.items()}
        return ", ".join(f"{client} {count:,}" for client, count in counts.items() if count)


def row_keys(rows: Dataset, data: DataArguments, label: str | None = None) -> list[bytes]:
    """A key of each row; equal keys are equal rows. `label` is the column that texts go with."""
    columns = _columns(rows.column_names, data, label)
    keys: list[bytes] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        keys += [_key(cells) for cells in zip(*(batch[name] for name in columns), strict=True)]
    return keys


def drop_duplicates(
    train: Sequence[bytes], held_out: Sequence[bytes]
) -> tuple[list[int], dict[str, int]]:
    """Positions of the training rows that stay, and how many were left out by reason.

    A training row stays when no held-out row and no earlier training row is equal to it.
    """
    known, seen, kept, repeated = set(held_out), set[bytes](), [], 0
    for i, key in enumerate(train):
        if key in known:
            continue
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        kept.append(i)
    left_out = len(train) - len(kept) - repeated
    return kept, {"held-out rows": left_out, "repeated rows": repeated}


def count_duplicates(
    clients: Mapping[str, Sequence[bytes]],
    held_out: Sequence[bytes],
    removed: Mapping[str, int] | None = None,
) -> Duplicates:
    """Equal rows among the keys of every client's rows and of the held-out rows."""
    own = {client: set(keys) for client, keys in clients.items()}
    union = set[bytes]().union(*own.values())
    return Duplicates(
        held_out_rows=len(held_out),
        held_out=sum(key in union for key in held_out),
        held_out_repeated=len(held_out) - len(set(held_out)),
        clients={
            client: ClientDuplicates(
                held_out=sum(key in own[client] for key in held_out),
                repeated=len(keys) - len(own[client]),
            )
            for client, keys in clients.items()
        },
        shared=sum(sum(key in keys for keys in own.values()) > 1 for key in union),
        removed=dict(removed or {}),
    )


def _columns(columns: Sequence[str], data: DataArguments, label: str | None) -> list[str]:
    try:
        form = row_format(columns, data)
    except DataError:  # a recipe with columns of its own
        own = [name for name in columns if not _identifies(name)]
        return own or list(columns)
    used = [part for part in form[1:] if part]
    return [*used, label] if label and form.kind == "text" else used


def _identifies(column: str) -> bool:
    return column.lower() in IDENTIFIERS or column.lower().endswith(("_id", "-id"))


def _key(cells: Sequence[Any]) -> bytes:
    text = json.dumps([_stripped(cell) for cell in cells], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return "" if value is None else str(value).strip()
