"""One writer in a directory, which a killed process leaves to the next."""

import os
import signal
import subprocess
import sys

import pytest

from fedtune.errors import ConfigError
from fedtune.lock import LOCK, check_free, hold, holder

HOLD = """
import os, sys, time
from pathlib import Path
from fedtune.lock import hold
with hold(Path(sys.argv[1])):
    if not os.fork():  # a child of a killed run keeps nothing
        os.setsid()
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the directory, and has forked a child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_with_the_first_ones_id(other, tmp_path):
    assert holder(tmp_path) == other.pid
    with pytest.raises(ConfigError, match=f"still going on in process {other.pid}"):
        check_free(tmp_path)
    with pytest.raises(ConfigError, match=f"process {other.pid}"), hold(tmp_path):
        pass
    assert holder(tmp_path) == other.pid  # a look takes nothing away


def test_an_end_frees_it_and_leaves_no_file(other, tmp_path):
    other.communicate("")
    assert not (tmp_path / LOCK).exists()
    with hold(tmp_path):
        assert (tmp_path / LOCK).is_file()
    assert holder(tmp_path) is None


def test_a_kill_frees_it_though_its_child_lives(other, tmp_path):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK).is_file()
    assert holder(tmp_path) is None
    with hold(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_directory_that_nobody_may_write_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="--output_dir: cannot write"), hold(tmp_path / "file"):
        pass
