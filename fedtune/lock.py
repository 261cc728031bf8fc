"""One writer at a time in an output directory; a process that ends, however, lets go of it.

A POSIX record lock: it belongs to the process alone, so that no child of a killed run keeps it. The
process that holds it must not open the file again, as closing it would let go of the lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune.errors import ConfigError

__all__ = ["LOCK", "check_free", "hold", "holder"]

LOCK = "run.lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
PID_BYTES = 32
SOON_S = 0.3  # a look at the lock takes it for an instant

log = logging.getLogger(__name__)


@contextmanager
def hold(directory: Path, *, wait_s: float = SOON_S) -> Iterator[None]:
    """Be the one who writes in `directory`, which is made where it is missing.

    Raises:
        ConfigError: another process is, and still was after `wait_s`; or the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _take(directory / LOCK, time.monotonic() + wait_s)
    except OSError as error:
        raise ConfigError(
            f"--output_dir: cannot write {directory}: {error.strerror}. Choose another directory."
        ) from None
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (directory / LOCK).unlink()
            os.close(descriptor)


def holder(directory: Path) -> int | None:
    """Id of the process that writes in `directory`, 0 where it is not known; None: nobody does.

    Not for the process that holds the lock itself.
    """
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _pid(descriptor) if error.errno in TAKEN else None
    finally:
        os.close(descriptor)
    return None


def check_free(directory: Path) -> None:
    """Raise ConfigError while another process writes in `directory`."""
    pid = holder(directory)
    if pid is not None:
        raise _taken(directory, pid)


def _take(path: Path, deadline: float) -> int | None:
    """The locked file; None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = _pid(descriptor)
            os.close(descriptor)
            if error.errno in TAKEN:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                raise _taken(path.parent, pid) from None
            log.warning("%s: this file system has no locks (%s)", path.parent, error.strerror)
            return None
        if _is(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)  # its last holder has taken it away in between


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _pid(descriptor: int) -> int:
    words = os.pread(descriptor, PID_BYTES, 0)
    return int(words) if words.isdigit() else 0


def _taken(directory: Path, pid: int) -> ConfigError:
    who = f"process {pid}" if pid else "another process"
    return ConfigError(
        f"--output_dir: the run in {directory} is still going on in {who}. Wait for its end, end "
        "it, or choose another directory."
    )
