"""Run folders with short paths: a Unix socket's path has little room."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.relay.folder import RunFolder


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ft-") as directory:
        yield Path(directory)


@pytest.fixture
def folder(short_path: Path) -> RunFolder:
    return RunFolder.create(short_path / "run")
