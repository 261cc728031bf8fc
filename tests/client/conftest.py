"""Run folders with short paths, named to this process as `fedtune join` does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.relay.folder import ENVIRONMENT, RunFolder
from tests.client.driver import planned


@pytest.fixture
def folder() -> Iterator[RunFolder]:
    """A folder without a plan."""
    with tempfile.TemporaryDirectory(prefix="ft-") as directory:
        yield RunFolder.create(Path(directory) / "run")


@pytest.fixture
def run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A folder with a plan, which `fedtune.patch` finds."""
    planned(folder)
    monkeypatch.setenv(ENVIRONMENT, str(folder.path))
    return folder
