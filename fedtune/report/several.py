"""Directories as they are named on a command line, to the runs in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["STRATEGIES", "run_directories"]

STRATEGIES = "strategies"  # of a run of several: one whole run each


def run_directories(directories: Iterable[Path]) -> list[Path]:
    """Every run, in order; one of several strategies stands for the runs of each."""
    return [run for directory in directories for run in _runs_of(directory)]


def _runs_of(directory: Path) -> list[Path]:
    inside = directory / STRATEGIES
    if not inside.is_dir():
        return [directory]
    begun = [path for path in inside.iterdir() if (path / "run.json").is_file()]
    # In the order in which they were run, which is that of the command.
    return sorted(begun, key=lambda path: (path / "run.json").stat().st_mtime)
