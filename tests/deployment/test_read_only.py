"""Directories that cannot be written: one line, on a file system that is read-only for root too."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SITE = "--superlink 127.0.0.1:1"
COMMANDS = {
    "certs certs --sites a": "cannot write certs: Read-only file system",
    "up --port 23999": "outputs/superlink: cannot be made: Read-only file system",
    f"join {SITE} --name a -- python": "outputs/a: cannot be made: Read-only file system",
    f"submit {SITE}": "--output_dir: cannot write outputs/federation",
    f"status {SITE}": "nothing listens there",
    "plot run": "no summary.json",
    "compare run": "no summary.json",
    "export run": "has no adapter/ or model/",
}


def mounted(command: list[str], *directories: str) -> list[str]:
    """The command, with these directories read-only in a mount namespace of its own."""
    each = "; ".join(
        f"mount --bind {d} {d} && mount -o remount,bind,ro {d}"
        for d in map(shlex.quote, directories)
    )
    return [
        "unshare",
        "-m",
        "sh",
        "-c",
        f"{each}; cd {directories[0]} && exec {shlex.join(command)}",
    ]


def fedtune(directory: Path, words: list[str], *others: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedtune.cli", *words]
    environment = {**os.environ, "HOME": str(directory), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("FLWR_HOME", None)
    return subprocess.run(
        mounted(command, str(directory), *others),
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def _can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("mount")
    done = subprocess.run(mounted(["touch", "x"], str(directory)), capture_output=True, check=False)
    if b"Read-only" not in done.stderr:
        pytest.skip("mounts nothing here")


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_home_and_working_directory_that_cannot_be_written(tmp_path: Path, line: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    done = fedtune(tmp_path, line.split())
    assert done.returncode == 2, done.stderr
    assert COMMANDS[line] in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("line", [f"status {SITE}", f"join {SITE} --name a -- python"])
def test_no_temporary_directory_that_can_be_written(tmp_path: Path, line: str) -> None:
    there = [d for d in ("/tmp", "/var/tmp", "/usr/tmp") if Path(d).is_dir()]
    done = fedtune(tmp_path, line.split(), *there)
    assert done.returncode == 2, done.stderr
    assert "Set TMPDIR to a directory that can be written" in done.stderr
    assert done.stderr.count("\n") == 1
