"""Why a command of Flower failed, read from what it prints for people."""

from __future__ import annotations

from fedtune.processes.supervisor import COLOURS

__all__ = ["reason_in"]

PREAMBLE = ("Using SuperLink: ", "INFO ")


def reason_in(text: str) -> str:
    """The reason on one line, without frames, colours and what Flower was about to do."""
    return " ".join(line for line in map(_without_frame, text.splitlines()) if _tells(line))


def _without_frame(line: str) -> str:
    return COLOURS.sub("", line).strip("\u2502\u256d\u256e\u2570\u256f\u2500 ")


def _tells(line: str) -> bool:
    """Whether a line of Flower's is more than what it is about to do."""
    return bool(line) and line != "Error" and not line.startswith(PREAMBLE) and line[-3:] != "..."
