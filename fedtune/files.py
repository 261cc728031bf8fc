"""Files that are either whole or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError

__all__ = [
    "append_line",
    "read_json",
    "read_object",
    "replace_directory",
    "sha256",
    "to_json",
    "write_bytes",
    "write_json",
    "write_text",
]


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        error.filename = os.fspath(path)  # which a full disk does not name
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN and infinity are written as null by the caller."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def to_json(value: Any) -> str:
    """One line of JSON for what was measured: NaN and infinity, wherever they are, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises OSError, or ValueError where it is none (or no UTF-8)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file of the user's.

    Args:
        fix: what to do about one that cannot be read.

    Raises:
        ConfigError: there is none.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected JSON in UTF-8, received a file that cannot be read ({error}). {fix}"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, received {type(value).__name__}. {fix}")
    return value


def sha256(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to disk."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(line + "\n")
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory beside `directory`; on success it takes its place.

    The old directory stays whole until the new one is on disk. Between the two renames a reader may
    find neither for an instant, but both always exist under one of the names. A failed write leaves
    `directory` as it was.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.new")
    old = directory.with_name(f".{directory.name}.old")
    if old.exists() and not directory.exists():
        old.rename(directory)  # an earlier process ended between the two renames
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for path in fresh.rglob("*"):
        if path.is_file():
            _flush(path)
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    _flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
