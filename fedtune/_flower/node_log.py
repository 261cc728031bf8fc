"""What Flower's node prints, as far as a site goes by it."""

from __future__ import annotations

from enum import Enum

__all__ = ["NodeEvent", "event_of"]


class NodeEvent(Enum):
    """What a line of a node's log says, by the words in it."""

    JOINED = "SuperNode ID:"  # the SuperLink has accepted it
    REFUSED = "[code: 2004]"  # its key is unknown, or connected already
    SENDING_END = "Sending: query.finish"  # the reply that the run has ended here
    SENT = "Sent successfully"  # the reply before


def event_of(line: str) -> NodeEvent | None:
    """The event in a line, or None."""
    return next((event for event in NodeEvent if event.value in line), None)
