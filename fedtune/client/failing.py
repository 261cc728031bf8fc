"""What a site's script tells of its own failure: to its log in full, to everybody else in short."""

from __future__ import annotations

import atexit
import sys
from contextlib import suppress

from fedtune.errors import FedtuneError
from fedtune.failures import failure_of
from fedtune.relay.folder import RunFolder

__all__ = ["ended_by", "note_failure", "told"]

_logged: set[str] = set()


def told(error: BaseException) -> str:
    """What leaves the site of an error; what stays goes to the script's log, under an id."""
    failure = failure_of(error)
    if not isinstance(error, FedtuneError) or error.is_private:
        _log(failure.id, failure.line)
    return failure.outside


def note_failure(error: BaseException) -> str:
    """`told` of what ends the script; `fedtune join` finds it in the run's folder, if any.

    Of several processes of one script the first one knows the cause.
    """
    failure = failure_of(error)
    _log(failure.id, failure.line)
    folder = RunFolder.of_environment()
    if folder is not None:
        with suppress(OSError):  # a full disk may well be the failure
            folder.write_failure(failure)
    return failure.outside


def ended_by(error: BaseException) -> str:
    """Why a script that leaves its training with this error answers no more."""
    if isinstance(error, Exception):
        return f"training failed: {note_failure(error)}"
    if isinstance(error, SystemExit):  # its code may be a text, which is then status 1
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        return f"the script ends with status {status}"
    return "the script is being ended"


def _note_uncaught() -> None:
    error = getattr(sys, "last_value", None)  # of the interpreter, once it has printed it
    if error is not None:
        note_failure(error)


def _log(number: str, line: str) -> None:
    if number not in _logged:
        _logged.add(number)
        with suppress(OSError, ValueError):  # its log is gone
            print(f"fedtune: {line}", file=sys.stderr, flush=True)


if RunFolder.of_environment() is not None:
    atexit.register(_note_uncaught)
