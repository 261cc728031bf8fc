"""The parts of the private shell that need no SuperLink."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskResponse

from fedtune._flower.app_bundle import build_app, hash_app
from fedtune._flower.executor import Executor
from fedtune._flower.journal import Journal
from fedtune._flower.run_watch import RunWatch
from fedtune._flower.supernode import Clock, Patience
from fedtune._flower.version import is_tested
from fedtune.deploy.bundle import APP, app_hash
from fedtune.errors import SiteError


def repack(bundle, compression, change=None):
    """The same files in a zip that was written otherwise."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(bundle)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in reversed(old.infolist()):
            data = old.read(entry)
            if change:
                data = change(entry.filename, data)
            new.writestr(entry.filename, data, compression)
    return out.getvalue()


def test_the_hash_is_of_files_not_of_the_zip():
    bundle = build_app(APP)
    assert build_app(APP) == bundle
    other = repack(bundle, zipfile.ZIP_STORED)
    assert other != bundle
    assert hash_app(other) == hash_app(bundle) == app_hash()


def test_the_hash_sees_every_file():
    bundle = build_app(APP)
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = [name for name in archive.namelist() if not name.startswith(".info")]
    assert sorted(names) == [
        "fedtune_app/__init__.py",
        "fedtune_app/client.py",
        "fedtune_app/server.py",
        "pyproject.toml",
    ]
    for changed in names:
        other = repack(
            bundle,
            zipfile.ZIP_DEFLATED,
            lambda name, data, changed=changed: data + b"\n#" * (name == changed),
        )
        # A comment in TOML is no change; a version is.
        assert (hash_app(other) == app_hash()) is (changed == "pyproject.toml")
    newer = repack(
        bundle, zipfile.ZIP_DEFLATED, lambda name, data: data.replace(b'"0.1.0"', b'"0.1.1"')
    )
    assert hash_app(newer) != app_hash()


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 1000])
def test_what_is_no_app_is_refused(content):
    with pytest.raises(SiteError, match="expected a Flower app bundle"):
        hash_app(content)


def test_a_file_that_would_fill_memory_is_refused():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.py", b"0" * (2**20 + 1))
    with pytest.raises(SiteError, match=r"big\.py has 1048577 bytes"):
        hash_app(out.getvalue())


def test_the_app_has_the_package_s_version():
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    assert project["project"]["version"] == version("fedtune")
    assert project["tool"]["flwr"]["app"]["config"] == {"settings": ""}


@pytest.mark.slow
def test_the_wheel_ships_the_app(tmp_path):
    repository = Path(__file__).resolve().parents[2]
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(repository / "fedtune", source / "fedtune")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / file, source)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"),
            *("-w", str(tmp_path), str(source)),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    shipped = zipfile.ZipFile(wheel).namelist()
    for file in ("pyproject.toml", "fedtune_app/client.py", "fedtune_app/server.py"):
        assert f"fedtune/deploy/app/{file}" in shipped


def test_only_the_tried_minors_are_tested():
    assert is_tested("1.41.0")
    assert is_tested("1.41.7")
    assert not is_tested("1.4.1")
    assert is_tested("1.42.0")
    assert not is_tested("1.40.0")
    assert not is_tested("1.43.0")
    assert not is_tested("2.41.0")


def test_a_journal_outlives_its_writer(tmp_path):
    journal = Journal(tmp_path / "task")
    assert (tmp_path / "task").stat().st_mode & 0o777 == 0o700
    assert journal.read(Journal.INPUT) is None
    journal.write(Journal.INPUT, b"\x00abc")
    journal.write(Journal.DONE)
    assert journal.read(Journal.INPUT) == b"\x00abc"
    assert journal.has(Journal.DONE)
    assert not journal.has(Journal.REPLYING)
    journal.delete()
    assert not (tmp_path / "task").exists()


def test_patience_grows_with_the_wait(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedtune._flower.supernode.time.monotonic", lambda: now[0])
    patience = Patience(0.05, 1.0)
    assert patience.pause() == 0.05
    now[0] = 10.0
    assert patience.pause() == pytest.approx(0.5)
    now[0] = 1000.0
    assert patience.pause() == 1.0
    patience.begin()
    assert patience.pause() == 0.05


def test_the_clock_rings_hears_and_sees_the_executor_end():
    here, there = socket.socketpair()
    here.setblocking(False)
    clock = Clock(here, RunWatch(list, lambda run, why: None))
    clock.sleep(3)
    there.setblocking(False)
    with pytest.raises(BlockingIOError):  # idle: nobody is woken
        there.recv(1)
    clock.sleep(0.5)
    assert there.recv(10)
    there.send(b"r")
    clock.sleep(0.5)
    assert clock.monotonic() > 0  # the rest is the module `time`
    there.close()
    with pytest.raises(SystemExit):
        clock.sleep(3)
    assert clock.executor_gone


class Tasks:
    """A SuperNode that gives the same task twice, since nobody has reported for it."""

    def __init__(self):
        self.tokens = iter("ab")

    def AcquireTask(self, request):
        found = AcquireTaskResponse(token=next(self.tokens))
        found.task.task_id = 5
        return found


def test_a_task_that_starts_slowly_has_one_process(tmp_path):
    here, there = socket.socketpair()
    executor = Executor(
        "127.0.0.1:1", b"", here, tmp_path, lambda code: None, list, lambda pid: time.sleep(600)
    )
    tasks = Tasks()
    executor._acquire(tasks)
    (first,) = executor._forks
    assert psutil.Process(first.pid).is_running()
    executor._acquire(tasks)
    (second,) = executor._forks
    try:
        assert not psutil.pid_exists(first.pid)
        assert psutil.Process(second.pid).is_running()
        assert second.token == "b"
        assert [path.name for path in tmp_path.iterdir()] == ["task-1"]
    finally:
        os.kill(second.pid, signal.SIGKILL)
        os.waitpid(second.pid, 0)
        there.close()
