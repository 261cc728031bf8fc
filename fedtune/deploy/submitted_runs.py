"""The runs that this user submitted on this machine, and where they leave their results."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import ConfigError
from fedtune.files import read_json, write_json

__all__ = ["check_register", "known_runs", "remember_run"]

KEPT_RUNS = 200


def check_register() -> None:
    """Whether a run can be remembered, which must be known before it begins; raises ConfigError."""
    file = _runs_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_name(".runs.lock")):
            write_json(file, _read_runs(file))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written ({error.strerror}), so that fedtune status and stop would "
            "not know the run. Set FLWR_HOME to a directory that can be written, or mend HOME."
        ) from None


def remember_run(run: str, output_dir: Path) -> None:
    """Write down where run `run` leaves its results, for `fedtune status`."""
    file = _runs_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_name(".runs.lock")):
        runs = {**_read_runs(file), run: str(output_dir.absolute())}
        write_json(file, dict(list(runs.items())[-KEPT_RUNS:]))


def known_runs() -> dict[str, Path]:
    """Run id -> output directory, of the runs submitted by this user on this machine."""
    return {run: Path(path) for run, path in _read_runs(_runs_file()).items()}


def _runs_file() -> Path:
    home = os.environ.get("FLWR_HOME")
    return (Path(home) if home else Path.home() / ".fedtune") / "runs.json"


def _read_runs(file: Path) -> dict[str, str]:
    try:
        runs = read_json(file)
    except (OSError, ValueError):
        return {}
    return runs if isinstance(runs, dict) else {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
