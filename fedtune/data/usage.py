"""What a Trainer really learns from: rows and tokens of its tokenized rows, as the loss sees them.

A label counts when it is not -100 and not the first of its row, which has nothing before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fedtune.errors import DataError

__all__ = ["IGNORED", "Given", "Usage", "usage_of"]

IGNORED = -100


@dataclass(frozen=True)
class Given:
    """What became of rows before a Trainer had them.

    Attributes:
        cut: rows longer than `limit` tokens; `longest` is the longest row.
        limit: tokens at which rows are cut, None without a limit; `limit_name` is what sets it.
        without_answer: conversations without an assistant turn, left out.
        every_turn: the loss is on all turns, since the chat template marks none.
        unwritten: what rows have and the chat template writes nothing of: `tools`, `tool_calls`.
    """

    cut: int = 0
    longest: int = 0
    limit: int | None = None
    limit_name: str = "--max_length"
    without_answer: int = 0
    every_turn: bool = False
    unwritten: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Rows of one Trainer's set and what is learned (or scored) of them.

    Attributes:
        rows: rows that the client has.
        rows_used: those with a label token; None where packing hides which row a token is of.
        rows_cut: rows of which `--max_length` or the context took tokens away.
        tokens: tokens that the model reads.
        label_tokens: those that the loss is on; None for classification.
    """

    rows: int
    rows_used: int | None
    rows_cut: int
    tokens: int | None
    label_tokens: int | None
    given: Given = Given()

    def as_json(self) -> dict[str, Any]:
        """The counts by name."""
        return {
            "rows": self.rows,
            "rows_used": self.rows_used,
            "rows_cut": self.rows_cut,
            "tokens": self.tokens,
            "label_tokens": self.label_tokens,
        }

    def check(self, what: str) -> None:
        """Raise a DataError when nothing is left; `what` is "training rows of client-1"."""
        if self.rows_used != 0 or not self.rows:
            return
        raise DataError(
            f"{what}: expected a row with something to learn from, received none: all "
            f"{self.rows} have no token left to learn from at {self._limit}. Fix: raise "
            "--max_length as far as the model reads, or shorten the prompts."
        )

    @property
    def _limit(self) -> str:
        given = self.given
        if given.limit_name == "--max_length":
            return "--max_length" if given.limit is None else f"--max_length {given.limit}"
        return f"--max_length {given.limit} ({given.limit_name})"

    def sentences(self, what: str) -> list[str]:
        """What is to be said of rows that are cut or useless."""
        said, given = [], self.given
        if self.rows_cut:
            said.append(
                f"{self.rows_cut:,} of {self.rows:,} {what} are cut at {self._limit}: the longest "
                f"has {given.longest:,} tokens"
            )
        if given.without_answer:
            said.append(
                f"{given.without_answer:,} of {self.rows:,} {what} have no assistant turn to "
                "learn from and are left out"
            )
        gone = 0 if self.rows_used is None else self.rows - given.without_answer - self.rows_used
        if gone > 0:
            said.append(
                f"{gone:,} of {self.rows:,} {what} have no token left to learn from at "
                f"{self._limit}: {self.rows_used:,} remain"
            )
        said += [
            f"{what}: the chat template writes nothing of their {name}; the model is not shown them"
            for name in given.unwritten
        ]
        return said


def usage_of(rows: Dataset | None, count: int, given: Given, *, packed: bool = False) -> Usage:
    """Usage of the tokenized `rows` of a Trainer, which were made of `count` rows.

    What has no `input_ids` and `labels` of its own (the collator may make them) is not counted.
    """
    usage = Usage(count, None, given.cut, None, None, given)
    names = getattr(rows, "column_names", None) or ()
    if rows is None or "input_ids" not in names:
        return usage
    table = rows.with_format("arrow")[:]
    ids, lengths = _flat(table["input_ids"])
    usage = replace(usage, tokens=len(ids))
    if "labels" not in names:
        return usage
    if not _lists(table["labels"]):
        return replace(usage, rows_used=len(lengths))
    labels, lengths = _flat(table["labels"])
    lines = lengths
    if "seq_lengths" in names:  # packed lines hold whole rows
        lengths = _flat(table["seq_lengths"])[0]
    learned = _learned(labels, lengths)
    hidden = packed and "seq_lengths" not in names
    return replace(
        usage,
        rows_used=None if hidden else int((learned > 0).sum()),
        label_tokens=int(_learned(labels, lines if hidden else lengths).sum()),
    )


def _learned(labels: NDArray[Any], lengths: NDArray[Any]) -> NDArray[Any]:
    """Label tokens of each row, without its first token."""
    counts = np.concatenate([[0], np.cumsum(labels != IGNORED)])
    ends = np.cumsum(lengths)
    begins = np.minimum(ends - lengths + 1, ends)
    learned: NDArray[Any] = counts[ends] - counts[begins]
    return learned


def _flat(column: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """All values of a column of lists, and the length of each list."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return (
        np.asarray(pc.list_flatten(cells)),
        np.asarray(pc.list_value_length(cells), dtype=np.int64),
    )


def _lists(column: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(column.type) or pa.types.is_large_list(column.type))
