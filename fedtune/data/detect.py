"""Row formats, found by column names.

| columns | kind |
|---|---|
| `--text_column C`, whatever else there is | text |
| `messages`, or sharegpt's `conversations` | messages |
| `instruction`, `input`, `output`; or `instruction`, `context`, `response` | instruction |
| `instruction`, `output`; or `question`, `answer` | instruction |
| `prompt`, `completion` | pair |
| `text` or `sentence`; a label beside it is ignored | text |

The first line that fits wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data.columns import quoted, require_column, require_text
from fedtune.errors import DataError, private

__all__ = ["RowFormat", "plain_texts", "requests", "row_format"]


class RowFormat(NamedTuple):
    """A kind of row and the columns that hold its parts."""

    kind: Literal["text", "messages", "instruction", "pair"]
    request: str  # the only column of text and of conversations
    given: str | None = None  # what the request is about
    answer: str = ""


FOUND_BY_NAME = (
    RowFormat("messages", "messages"),
    RowFormat("messages", "conversations"),
    RowFormat("instruction", "instruction", "input", "output"),
    RowFormat("instruction", "instruction", "context", "response"),
    RowFormat("instruction", "instruction", None, "output"),
    RowFormat("instruction", "question", None, "answer"),
    RowFormat("pair", "prompt", None, "completion"),
    RowFormat("text", "text"),
    RowFormat("text", "sentence"),
)


def row_format(columns: Sequence[str], data: DataArguments) -> RowFormat:
    """Format of language rows with these columns, by the table above.

    Raises:
        DataError: no format fits, or `--text_column` is not there.
    """
    if data.text_column is not None:
        return RowFormat("text", require_column(columns, data.text_column, "--text_column"))
    for known in FOUND_BY_NAME:
        if {part for part in known[1:] if part} <= set(columns):
            return known
    raise DataError(
        "columns: expected messages or conversations, or instruction/input/output, "
        f"question/answer, prompt/completion, or text; received {private(quoted(columns))}. "
        "Fix: rename them, or name the text with --text_column."
    )


def requests(rows: Dataset, form: RowFormat) -> list[tuple[str, str]]:
    """(request, given) of each row; a missing given is the empty string."""
    asked = require_text(rows, form.request)
    if form.given is None:
        return [(request, "") for request in asked]
    given = require_text(rows, form.given, blank_allowed=True, null_allowed=True)
    return list(zip(asked, given, strict=True))


def plain_texts(rows: Dataset, data: DataArguments) -> list[str]:
    """Texts to classify.

    `--text_column`, else `text` or `sentence`, else the given part of instruction rows or, where
    that is empty, the request.

    Raises:
        DataError: no such column, or an empty cell.
    """
    columns = rows.column_names
    by_name = [f for f in FOUND_BY_NAME if f.kind == "text" and f.request in columns]
    form = by_name[0] if by_name and data.text_column is None else row_format(columns, data)
    if form.kind == "messages":
        raise DataError(
            f"columns: expected a text to classify, received {private(quoted(columns))}. "
            "Fix: name it with --text_column."
        )
    return [given if given.strip() else request for request, given in requests(rows, form)]
