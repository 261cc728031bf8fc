"""A process that ends with its parent, even one that was killed. Standard library only.

Run as a file it becomes another program that does so:

    python -I -S parent.py PARENT_PID PROGRAM [ARGUMENT ...]

which, unlike `preexec_fn`, runs no Python between fork and exec of a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["die_with_parent"]

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends; off Linux nothing happens.

    Call it in the child, or pass it as `preexec_fn`. The kernel goes by the *thread* that started
    the child, so start children from a thread that lives as long as they should. `parent` is the
    expected pid: when that one has ended already, this process ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
