"""One file of rows, read by `datasets`, with errors that name the bad line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from fedtune.errors import DataError

__all__ = ["READERS", "first_line", "not_empty", "quiet", "read_file"]

READERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
# pandas reads "NA", "null" and the empty string as missing: here they are text, as in jsonl
READER_SETTINGS: dict[str, dict[str, Any]] = {"csv": {"na_filter": False}}


def read_file(path: Path, flag: str) -> Dataset:
    """Rows of a csv, json, jsonl or parquet file; `flag` opens the error messages.

    Raises:
        DataError: the file is missing, of an unknown kind, empty or unreadable.
    """
    reader = READERS.get(path.suffix.lower())
    if not path.exists():
        near = [p.name for p in sorted(path.parent.glob("*")) if p.suffix.lower() in READERS]
        there = f" ({path.parent} has {', '.join(near[:5])})" if near else ""
        raise DataError(f"{flag}: expected a file, received {path}, which does not exist. "
                        f"Fix: check the path{there}.")  # fmt: skip
    if reader is None or not path.is_file():
        raise DataError(
            f"{flag}: expected a file that ends in {', '.join(READERS)}, received {path}. "
            "Fix: convert or rename it; for a hub data set use --dataset_name."
        )
    if path.stat().st_size == 0:
        raise _empty(f"{flag} {path}")
    try:
        with quiet():
            # The content's hash is part of the cache key: datasets itself looks at the
            # modification time only, which a copy or an unpacked archive may preserve.
            rows: Dataset = load_dataset(
                reader,
                name=f"sha256-{_sha256(path)[:16]}",
                data_files=str(path),
                split="train",
                **READER_SETTINGS.get(reader, {}),
            )
            rows.data.validate(full=True)  # else bytes that are no UTF-8 fail when first read
    except Exception as error:  # each reader raises its own kinds; the user needs one line
        if "corresponds to no data" in str(error):
            raise _empty(f"{flag} {path}") from error
        reason = (_bad_json(path) if reader == "json" else None) or first_line(error)
        raise DataError(
            f"{flag}: expected readable {path.suffix[1:]}, received {path}: {reason}. "
            "Fix: repair or remove that part of the file."
        ) from error
    return not_empty(rows, f"{flag} {path}")


def _bad_json(path: Path) -> str | None:
    """What is wrong with the first bad line of JSON lines (or with a whole JSON document)."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    whole = content.lstrip()[:1] == b"["
    for number, line in enumerate([content] if whole else content.split(b"\n"), start=1):
        try:
            value = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"line {error.lineno if whole else number} is no JSON ({error.msg})"
        except UnicodeDecodeError as error:
            line_number = content[: error.start].count(b"\n") + 1 if whole else number
            return f"line {line_number} is not UTF-8"
        for entry, item in enumerate(value if whole else [value], start=1):
            if not isinstance(item, dict):
                where = f"entry {entry}" if whole else f"line {number}"
                return f"{where} is a JSON {type(item).__name__}, not an object"
    return None


def not_empty(rows: Dataset, source: str) -> Dataset:
    """`rows`, or a DataError that names their source."""
    if len(rows) == 0:
        raise _empty(source)
    return rows


def _empty(source: str) -> DataError:
    return DataError(f"{source}: expected at least one row, received none. Fix: add rows to it.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
