"""The output directory of a run: who may write there, and what a resumed run must share.

A run asks first (`check_output_dir`), then loads its model and data, then writes
(`prepare_output_dir`): one that cannot start leaves nothing behind and deletes nothing.

`run.json` is written before anything else, so that a run killed before its first checkpoint can be
resumed too. It also proves that the directory is fedtune's: nothing is deleted without it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError
from fedtune.files import read_json, write_json
from fedtune.lock import LOCK

__all__ = [
    "MARKER",
    "OWN",
    "check_output_dir",
    "forget_ending",
    "prepare_output_dir",
    "write_marker",
]

log = logging.getLogger(__name__)

MARKER = "run.json"

# What --overwrite may delete.
OWN = frozenset(
    [
        "adapter",
        "arms",
        "attempts.jsonl",
        "best",
        "checkpoints",
        "clients",
        "deployment",
        "federation.json",
        "logs",
        "loss.png",
        "model",
        "own_rows.json",
        "report.html",
        "rounds.jsonl",
        "run.json",
        LOCK,
        "seeds",
        "stop",
        "strategies",
        "submission.json",
        "summary.json",
        "tensorboard",
    ]
)


def check_output_dir(
    directory: str | Path,
    *,
    resume: bool,
    overwrite: bool,
    settings: Mapping[str, Any],
    data: Mapping[str, str] | None = None,
    code: Mapping[str, str] | None = None,
) -> None:
    """Whether `prepare_output_dir` would accept `directory`; nothing is changed.

    Args:
        data: what the run reads, name to hash; a continued run must read the same.
        code: the same of what may change with a warning: the recipe, its YAML, whose settings are
            compared themselves, and packages by version.

    Raises:
        ConfigError: it holds an earlier run and neither flag is given, `resume` finds no run or one
            with other settings or data, `overwrite` finds files that fedtune did not make, nobody
            may write there, or another process does.
    """
    directory = Path(directory)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_dir: {there} is a file. Choose a directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--output_dir: cannot write {directory}: no permission in {there}. Choose another "
            "directory, or change its permissions."
        )
    if resume:
        _check_same(directory, settings, data or {}, code or {})
        return
    names = _names(directory)
    if names and overwrite:
        _check_own(directory, names)
    elif names:
        _refuse(directory, names)


def prepare_output_dir(
    directory: str | Path,
    *,
    resume: bool,
    overwrite: bool,
    settings: Mapping[str, Any],
    data: Mapping[str, str] | None = None,
    code: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Make `directory` ready for a run with `settings` (see `run_settings`); returns its path.

    `facts` are what its summary will say of it beside what is measured. Whoever calls this holds
    the directory's lock.

    Raises:
        ConfigError: as `check_output_dir`, or the disk refuses the write.
    """
    directory = Path(directory)
    given: dict[str, Any] = {"settings": settings, "data": data, "code": code}
    check_output_dir(directory, resume=resume, overwrite=overwrite, **given)
    if not resume:
        _delete_run(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        forget_ending(directory)
        write_marker(directory, facts=facts or {}, **given)
    except OSError as error:
        raise ConfigError(
            f"--output_dir: cannot write {directory}: {error.strerror}. Choose another directory."
        ) from None
    return directory


def forget_ending(directory: Path) -> None:
    """Remove what an earlier try said of its end; the run goes on."""
    for name in ("summary.json", "report.html", "loss.png"):
        (directory / name).unlink(missing_ok=True)


def write_marker(
    directory: Path,
    *,
    settings: Mapping[str, Any],
    data: Mapping[str, str] | None,
    code: Mapping[str, str] | None,
    facts: Mapping[str, Any],
) -> None:
    """Write `run.json`."""
    content = {"settings": settings, "data": data or {}, "code": code or {}, "facts": facts}
    plain = {name: dict(values) for name, values in content.items()}
    write_json(directory / MARKER, {"fedtune_run": 1, **plain})


def _names(directory: Path) -> list[str]:
    """What lies in it, beside a lock."""
    names = (path.name for path in directory.iterdir()) if directory.is_dir() else ()
    return sorted(name for name in names if name != LOCK)


def _check_same(
    directory: Path, settings: Mapping[str, Any], data: Mapping[str, str], code: Mapping[str, str]
) -> None:
    run = _marker(directory)
    if run is None:
        raise ConfigError(
            f"--resume: no run to continue in {directory} (no {MARKER}). Check --output_dir, or "
            "leave out --resume."
        )
    stored, changed = run["settings"], _changed(run.get("code"), code)
    for name in sorted({*stored, *settings}):
        if stored.get(name) != settings.get(name):
            told = f" ({', '.join(changed)} has changed since)" if changed else ""
            raise ConfigError(
                f"--resume: the run in {directory} has --{name} {stored.get(name)}, received "
                f"{settings.get(name)}{told}. Give the earlier value, or use another --output_dir."
            )
    for name in _changed(run.get("data"), data):
        raise ConfigError(
            f"--resume: {name} has changed since the run in {directory} began. Bring its earlier "
            "content back, or begin again with --overwrite."
        )
    for name in changed:
        log.warning("--resume: %s has changed since the run began", name)


def _changed(stored: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Names whose content differs; one that is gone or new is another setting, refused as such."""
    known = stored or {}
    return [name for name in sorted(known) if name in now and known[name] != now[name]]


def _refuse(directory: Path, names: list[str]) -> None:
    if _marker(directory) is None:
        raise ConfigError(
            f"--output_dir: {directory} is not empty ({names[0]}). Choose another directory."
        )
    raise ConfigError(
        f"--output_dir: {directory} holds an earlier run. Continue it with --resume, replace it "
        "with --overwrite, or choose another directory."
    )


def _check_own(directory: Path, names: list[str]) -> None:
    foreign = [name for name in names if not _own(name)]
    if foreign or _marker(directory) is None:
        what = f"{foreign[0]}, which fedtune did not write" if foreign else f"no {MARKER} of a run"
        raise ConfigError(
            f"--overwrite: {directory} holds {what}; nothing is deleted. Choose another directory."
        )


def _delete_run(directory: Path) -> None:
    for name in sorted(_names(directory), key=lambda name: name == MARKER):  # the proof goes last
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _own(name: str) -> bool:
    """A name of ours, or what an interrupted write of it left (`.name.tmp`, `.new`, `.old`)."""
    if name.startswith("."):
        stem, _, suffix = name[1:].rpartition(".")
        return stem in OWN and suffix in ("tmp", "new", "old")
    return name in OWN


def _marker(directory: Path) -> dict[str, Any] | None:
    """`run.json` of the run in `directory`, or None when it holds no run of fedtune."""
    try:
        stored = read_json(directory / MARKER)
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or "fedtune_run" not in stored:
        return None
    return stored if isinstance(stored.get("settings"), dict) else None
