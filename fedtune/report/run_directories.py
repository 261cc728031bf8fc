"""Directories as they are named on a command line, to the runs in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fedtune.lists import split_names

__all__ = ["STRATEGIES", "folder_of", "run_directories"]

STRATEGIES = "strategies"  # of a run of several: one whole run each


def folder_of(strategy: str) -> str:
    """Of a strategy, below `strategies/`."""
    return strategy.replace(":", "_")


def run_directories(directories: Iterable[Path]) -> list[Path]:
    """Every run, in order; one of several strategies stands for those of them that began."""
    return [run for directory in directories for run in _runs_of(directory)]


def _runs_of(directory: Path) -> list[Path]:
    inside = directory / STRATEGIES
    if not inside.is_dir():
        return [directory]
    begun = {path.name: path for path in sorted(inside.iterdir()) if (path / "run.json").is_file()}
    order = [folder_of(name) for name in _asked(directory) if folder_of(name) in begun]
    return [begun[name] for name in dict.fromkeys([*order, *begun])]


def _asked(directory: Path) -> list[str]:
    """Strategies in the order of the command."""
    try:
        settings = json.loads((directory / "run.json").read_text(encoding="utf-8"))["settings"]
        return split_names(str(settings["strategy"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []
