"""Which processes belong to a part, and how none of them outlives the supervisor.

Flower's programs start others in sessions of their own, and some of those outlive their parents.
So a part is more than one process: all that carry its mark in their environment, all in its
session, and all descendants of these.

When the supervisor is killed outright, the kernel kills its parts (`parent.py`). That is not
enough: a Flower ServerApp that waits for something outlives the SuperLink that started it. So a
small process beside the supervisor, the sweeper, waits for its end and then kills all that carry
its mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

__all__ = ["MARK", "family", "start_sweeper", "subreaper"]

MARK = "FEDTUNE_PARTS"  # environment of a part: SUPERVISOR/PART, after those of outer supervisors
POLL_S, SWEEP_S = 0.05, 0.2
GIVE_UP_S = 20.0  # after SIGKILL; only a process stuck in the kernel takes longer
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


def family(marks: set[str], sessions: set[int]) -> list[psutil.Process]:
    """Living processes with one of the marks or in one of the sessions, and their descendants."""
    found: dict[psutil.Process, None] = {}
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _belongs(process, marks, sessions):
            found.update(dict.fromkeys(_with_descendants(process)))
    return [process for process in found if _lives(process)]


def subreaper(wanted: bool) -> bool:
    """Whether orphaned descendants become children of this process; returns what was before."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    before = ctypes.c_int(0)
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)
    return bool(before.value)


def start_sweeper(token: str) -> subprocess.Popen[bytes]:
    """A process that waits for the end of this one, then kills all that carry `token`."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(os.getpid()), token],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the supervisor
    )


def _belongs(process: psutil.Process, marks: set[str], sessions: set[int]) -> bool:
    try:
        if os.getsid(process.pid) in sessions:
            return True
        carried = process.environ().get(MARK, "").split(":")
    except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
        return False
    return any(mark in marks or mark.partition("/")[0] in marks for mark in carried)


def _with_descendants(process: psutil.Process) -> Iterator[psutil.Process]:
    yield process
    with contextlib.suppress(psutil.Error):
        yield from process.children(recursive=True)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _sweep(supervisor: int, token: str) -> None:
    while os.getppid() == supervisor:
        time.sleep(SWEEP_S)
    deadline = time.monotonic() + GIVE_UP_S
    while (left := family({token}, set())) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(POLL_S)


if __name__ == "__main__":
    _sweep(int(sys.argv[1]), sys.argv[2])
