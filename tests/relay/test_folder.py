"""The run folder: private, whole files only, the same to everyone who opens it."""

from __future__ import annotations

import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.relay.folder import ENVIRONMENT, Progress, RunFolder, SitePlan

PLAN = SitePlan("run", "site", num_rounds=3, steps=5, epochs=0.0, carry=True, seed=1)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_gets_in(folder: RunFolder) -> None:
    assert mode(folder.path) == 0o700
    assert mode(folder.authkey_file) == 0o600
    assert mode(folder.replies) == 0o700
    assert len(folder.authkey) == 32


def test_an_open_folder_is_closed_to_others(short_path: Path) -> None:
    (short_path / "run").mkdir(mode=0o755)
    assert mode(RunFolder.create(short_path / "run").path) == 0o700


def test_the_key_is_made_once(folder: RunFolder, short_path: Path) -> None:
    assert RunFolder.create(folder.path).authkey == folder.authkey
    assert RunFolder.create(short_path / "other").authkey != folder.authkey


def test_empty_folder(folder: RunFolder) -> None:
    assert folder.plan is None
    assert folder.exit_status is None
    assert folder.end == ""
    assert folder.status == {}
    assert folder.progress == Progress(0, False)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, steps=0, epochs=0.5, max_steps=9)], ids=str)
def test_files_come_back(folder: RunFolder, plan: SitePlan) -> None:
    folder.write_plan(plan)
    folder.write_status(state="waiting", round=2)
    folder.write_progress(Progress(2, True, "done"))
    folder.write_exit_status(-9, "killed")
    other = RunFolder(folder.path)
    assert other.plan == plan
    assert other.status == {"state": "waiting", "round": 2}
    assert other.progress == Progress(2, True, "done")
    assert (other.exit_status, other.end) == (
        -9,
        "the site's script was killed by SIGKILL (killed)",
    )


@pytest.mark.parametrize("text", ["", "{", '{"status": '])
def test_a_file_that_is_half_there_is_not_there(folder: RunFolder, text: str) -> None:
    for name in ("plan.json", "ended.json", "status.json", "progress.json"):
        (folder.path / name).write_text(text)
    assert folder.plan is None
    assert folder.exit_status is None
    assert folder.status == {}
    assert folder.progress == Progress()


def test_a_long_path_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 100)
    with pytest.raises(ConfigError, match=r"at most 107 bytes, received \d+. Set TMPDIR"):
        RunFolder.create(path)
    assert not path.exists()


def test_the_limit_counts_bytes_up_to_the_last(short_path: Path) -> None:
    room = 107 - len(str(short_path)) - len("//trainer.sock")
    folder = RunFolder.create(short_path / ("é" * (room // 2) + "x" * (room % 2)))
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder.socket))
    with pytest.raises(ConfigError):
        RunFolder.create(Path(f"{folder.path}x"))


def test_of_environment(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert RunFolder.of_environment() is None
    monkeypatch.setenv(ENVIRONMENT, str(folder.path))
    opened = RunFolder.of_environment()
    assert opened is not None
    assert opened.authkey == folder.authkey
