"""One file of rows, whatever it is written as, with errors that name the bad line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, Features, Json, load_dataset
from datasets.exceptions import DatasetGenerationError

from fedtune.data.csv_rows import read_csv
from fedtune.data.json_rows import read_json
from fedtune.data.origin import mark
from fedtune.data.text import BINARY, BadText, decode, say_once, unpack
from fedtune.errors import DataError, private

__all__ = ["READERS", "first_line", "not_empty", "quiet", "read_file"]

READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
PACKED = (".gz", ".zst")
PARQUET = b"PAR1"


class Table(NamedTuple):
    """Rows of a file, and the line on which each begins, where they have lines."""

    rows: Dataset
    lines: Sequence[int] | None


def read_file(path: Path, flag: str) -> Dataset:
    """Rows of a csv, tsv, json, jsonl or parquet file, packed or not; `flag` opens the errors.

    What is guessed (encoding, delimiter, another kind than the name says) is logged in one line.
    Every cell of a csv file is text. The rows know their line (see `origin`).

    Raises:
        DataError: the file is missing, of an unknown kind, empty or unreadable.
    """
    content = _content(path, flag)
    try:
        content = unpack(content)
        table = _read(path, _kind(path, content, flag), content)
        rows = _stripped(table.rows, path.name)
    except BadText as error:
        raise _unreadable(path, flag, str(error)) from error
    return mark(not_empty(rows, f"{flag} {path}"), path.name, table.lines)


def _content(path: Path, flag: str) -> bytes:
    if not path.exists():
        near = [p.name for p in sorted(path.parent.glob("*")) if _suffix(p) in READERS]
        there = f" ({path.parent} has {', '.join(near[:5])})" if near else ""
        raise DataError(f"{flag}: expected a file, received {path}, which does not exist. "
                        f"Fix: check the path{there}.")  # fmt: skip
    if not path.is_file():
        raise _unknown(path, flag, "a directory")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{flag}: expected a file that can be read, received {path}: {error.strerror}. "
            "Fix: check who may read it."
        ) from None
    if not content:
        raise _empty(f"{flag} {path}")
    return content


def _suffix(path: Path) -> str:
    """The suffix that tells the kind: `.csv` of rows.csv.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower()


def _kind(path: Path, content: bytes, flag: str) -> str:
    """Reader of these bytes: what they are comes before what the name says."""
    named, found = READERS.get(_suffix(path)), None
    binary = next((what for magic, what in BINARY.items() if content.startswith(magic)), None)
    if binary is not None and named != "parquet":
        raise _unknown(path, flag, binary)
    if content.startswith(PARQUET):
        found = "parquet"
    elif named != "json" and content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        found = "json"
    if found is not None and found != named:
        say_once(f"{path.name} is read as {found}, which it is.")
    kind = found or named
    if kind is None:
        raise _unknown(path, flag, "another kind")
    return kind


def _read(path: Path, kind: str, content: bytes) -> Table:
    if kind == "parquet":
        return Table(_parquet(path, content), None)
    text = decode(content, path.name)
    if not text.strip():
        return Table(Dataset.from_dict({}), None)
    if kind == "csv":
        columns, lines = read_csv(text, path.name, "\t" if _suffix(path) == ".tsv" else ",")
        return Table(Dataset.from_dict(columns), lines)
    rows, numbers = read_json(text, path.name)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(_dataset({name: [row.get(name) for row in rows] for name in names}), numbers)


def _dataset(columns: dict[str, list[Any]]) -> Dataset:
    """Columns of Python values, each kept as it is, whatever else its column holds."""
    rows = Dataset.from_dict(columns, on_mixed_types="use_json")
    # Arrow would make 1 of [1, 2.5] a fraction.
    mixed = [name for name, cells in columns.items() if {int, float} <= set(map(type, cells))]
    if not mixed:
        return rows
    features = Features({**rows.features, **{name: Json() for name in mixed}})
    return Dataset.from_dict(columns, features=features)


def _parquet(path: Path, content: bytes) -> Dataset:
    try:
        with quiet():
            # The content's hash is part of the cache key: datasets itself looks at the
            # modification time only, which a copy or an unpacked archive may preserve.
            rows: Dataset = load_dataset(
                "parquet",
                name=f"sha256-{hashlib.sha256(content).hexdigest()[:16]}",
                data_files=str(path),
                split="train",
            )
    except Exception as error:  # the reader raises many kinds; the user needs one line
        if "corresponds to no data" in str(error):
            return Dataset.from_dict({})
        raise BadText(private(first_line(error))) from error
    return rows


def _stripped(rows: Dataset, name: str) -> Dataset:
    """`rows` without the spaces around their columns' names."""
    spaced = {column: column.strip() for column in rows.column_names if column != column.strip()}
    if not spaced:
        return rows
    names = [column.strip() for column in rows.column_names]
    if len(set(names)) < len(names):
        given = private(", ".join(map(repr, spaced)))
        raise BadText(f"its columns differ by spaces alone: {given}")
    say_once(f"{name}: spaces around {', '.join(map(repr, spaced.values()))} are taken off.")
    return rows.rename_columns(spaced)


def _unreadable(path: Path, flag: str, reason: str) -> DataError:
    kind = "".join(path.suffixes[-2:]).lstrip(".") or "rows"
    return DataError(
        f"{flag}: expected readable {kind}, received {path}: {reason}. "
        "Fix: repair or remove that part of the file."
    )


def _unknown(path: Path, flag: str, received: str) -> DataError:
    return DataError(
        f"{flag}: expected a file that ends in {', '.join(READERS)}, received {path}, {received}. "
        "Fix: convert or rename it; for a hub data set use --dataset_name."
    )


def not_empty(rows: Dataset, source: str) -> Dataset:
    """`rows`, or a DataError that names their source."""
    if len(rows) == 0:
        raise _empty(source)
    return rows


def _empty(source: str) -> DataError:
    return DataError(f"{source}: expected at least one row, received none. Fix: add rows to it.")


def first_line(error: Exception) -> str:
    """First line of the reason, without its full stop."""
    told = isinstance(error, DatasetGenerationError)  # its own text is always the same
    inner = error.__cause__ or error if told else error
    lines = str(inner).strip().splitlines()
    return (lines[0] if lines else type(inner).__name__).rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or reader logs of `datasets` inside; its settings come back after."""
    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
