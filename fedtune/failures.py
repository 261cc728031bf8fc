"""Why a site's script failed: in full in the site's own log, as type and id everywhere else.

The text of an exception may hold a row. Of fedtune's own errors all but the private parts leaves
the site; of any other the type alone. An id leads from there to the site's log.
"""

from __future__ import annotations

import re
import secrets
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from fedtune.errors import FedtuneError

__all__ = ["Failure", "failure_of", "how_ended", "printed_failure", "signal_name"]

ATTRIBUTE = "fedtune_failure_id"  # of an exception: it is told of twice under one id
RANK = re.compile(r"^\[rank\d+\]: ?")  # before each line of a process of torchrun
TYPE = re.compile(r"(?:\w+\.)*([A-Za-z_]\w{0,79})(?:: .*|:)?", re.DOTALL)
LAUNCHER = "ChildFailedError"  # torchrun's own, after that of the process which failed
RANK_KILLED = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID")


@dataclass(frozen=True)
class Failure:
    """One failure of a site's script.

    Attributes:
        id: leads to the text in the site's log.
        text: in full, for the site alone.
        outside: what leaves the site.
    """

    id: str
    text: str
    outside: str

    @property
    def line(self) -> str:
        """For the site's log."""
        return f"[id {self.id}] {self.text}"


def failure_of(error: BaseException) -> Failure:
    """What there is to tell of an exception; the same id whenever it is asked."""
    number: str = getattr(error, ATTRIBUTE, "")
    if not number:
        number = secrets.token_hex(4)
        setattr(error, ATTRIBUTE, number)
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, FedtuneError):
        outside = " ".join(error.outside.split())
        return Failure(number, text, f"{outside} (id {number})" if error.is_private else outside)
    return Failure(number, f"{kind}: {text}" if text else kind, f"{kind} (id {number})")


def printed_failure(lines: Iterable[str]) -> Failure | None:
    """The last traceback that a script has printed, its launcher's own aside; None without one."""
    found: str | None = None
    frames, killed = False, ""
    for raw in lines:
        line = RANK.sub("", raw.rstrip())
        if line.startswith(("Traceback (most recent call last):", '  File "')):
            frames = True
        elif frames and line and not line[0].isspace():
            frames = False
            if (match := TYPE.fullmatch(line)) and match[1] != LAUNCHER:
                found = line
        elif match := RANK_KILLED.search(line):
            killed = f"a process of the script was killed by {match[1]}"
    number = secrets.token_hex(4)
    if found is None:
        return Failure(number, killed, killed) if killed else None
    match = TYPE.fullmatch(found)
    assert match is not None
    return Failure(number, found, f"{match[1]} (id {number})")


def how_ended(status: int) -> str:
    """Of a process: `ended with status 3`, `was killed by SIGKILL`."""
    return f"was killed by {signal_name(-status)}" if status < 0 else f"ended with status {status}"


def signal_name(number: int) -> str:
    """`SIGKILL`, or `signal 40` where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
