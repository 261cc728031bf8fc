"""The last line of a command, and signals that come once, twice and to whom nobody listens."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fedtune.processes.last_line import words_of
from fedtune.processes.signals import Stopped, ends_once, status_of

ENDING = """
import os, signal, sys, time
from fedtune.processes.signals import Stopped, ends_once, interrupted_by, status_of
with ends_once():
    try:
        print("ready", flush=True)
        time.sleep(30)
    except (KeyboardInterrupt, Stopped) as stop:
        print("ending", flush=True)
        time.sleep(0.5)
        print("clean", flush=True)
        status = status_of(stop)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
sys.exit(status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_interrupt_the_end(number):
    process = subprocess.Popen([sys.executable, "-c", ENDING], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "ending\n"
    for again in (number, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(again)
        time.sleep(0.05)
    assert process.communicate(timeout=10)[0] == "clean\n"
    assert process.returncode == 128 + number


def test_handlers_come_back_and_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    known = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with ends_once():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not known[1]
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == known
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_status_of_a_signal():
    assert status_of(KeyboardInterrupt()) == 130
    assert status_of(Stopped(143)) == 143


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_line_that_nobody_can_read_changes_no_status(stream):
    code = (
        "import sys; from fedtune.processes.last_line import say_last; "
        f"say_last('over', sys.{stream}); sys.exit(143)"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], check=False, **{stream: write})
    os.close(write)
    assert done.returncode == 143


def test_what_the_system_refuses_is_one_line():
    denied = PermissionError(13, "Permission denied", "/srv/x")
    assert words_of(denied).startswith("cannot use /srv/x: Permission denied. Check its disk")
    gone = FileNotFoundError(2, "No such file or directory")
    assert words_of(gone) == "the working directory is gone. Change to one that exists."
    nowhere = FileNotFoundError(2, "No usable temporary directory found in ['/x']")
    assert words_of(nowhere).endswith("Set TMPDIR to a directory that can be written.")
    assert words_of(OSError(28, "No space left on device")) == "No space left on device."
