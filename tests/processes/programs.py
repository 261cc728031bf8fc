"""Run what the command line runs, in processes of their own; count what is left of them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

import psutil

COMMAND = """
import argparse, importlib, sys
from fedtune.errors import FedtuneError
module = importlib.import_module(sys.argv[1])
parser = argparse.ArgumentParser()
module.add_arguments(parser)
try:
    sys.exit(module.run(parser.parse_args(sys.argv[2:])))
except FedtuneError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


class Program:
    """A program, as a rule a Python one; leaving the block ends it."""

    def __init__(self, code="", *words, command=None, cwd=None):
        python = [sys.executable, "-c", code, *map(str, words)]
        self.process = subprocess.Popen(
            python if command is None else command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate()

    def line(self, start):
        """Read on to a line that starts so; returns it."""
        for line in self.process.stdout:
            if line.startswith(start):
                return line.rstrip("\n")
        raise AssertionError(f"no line {start!r}; stderr: {self.process.stderr.read()}")

    def family(self):
        """It and all its descendants, as they are now."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def end(self, number=signal.SIGTERM, timeout=30):
        """Signal it and wait; returns its status, and what it printed after what was read."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


def up(*words):
    """`fedtune up`."""
    return Program(COMMAND, "fedtune.deploy.up", *words)


def left(processes, within_s=5.0):
    """Those that still live after at most `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        living = [process for process in processes if lives(process)]
        if not living or time.monotonic() > deadline:
            return living
        time.sleep(0.05)


def lives(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, within_s=20.0):
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return value
