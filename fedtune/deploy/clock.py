"""Two hosts' clocks: Flower takes what a site has signed only where they nearly agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

__all__ = ["AHEAD_S", "BEHIND_S", "CLOCK", "SITE", "TIME", "Offset", "offset_of"]

AHEAD_S, BEHIND_S = 5.0, 305.0  # of the server's clock; a site beyond them is refused
WARN_S = 2.0
# Headers: seconds since 1970 in an answer; a site's name and its own seconds in what it asks.
TIME, SITE, CLOCK = "fedtune-time", "fedtune-site", "fedtune-clock"
DATE_S = 2.0  # by how much the Date of an answer may be older than the answer
UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(frozen=True)
class Offset:
    """By how much this host's clock is ahead of the server's (negative: behind), in seconds.

    Attributes:
        least: at least so much.
        most: at most so much; a slow answer leaves more room.
    """

    least: float
    most: float

    @property
    def is_refused(self) -> bool:
        """Whether Flower would take nothing of what this host signs."""
        return self.least >= AHEAD_S or self.most <= -BEHIND_S

    @property
    def is_notable(self) -> bool:
        """Whether the clocks surely differ."""
        return self.least >= WARN_S or self.most <= -WARN_S

    def __str__(self) -> str:
        middle = (self.least + self.most) / 2
        return f"{span(abs(middle))} {'ahead of' if middle > 0 else 'behind'} the server's"


def offset_of(asked: float, answered: float, headers: Mapping[str, str]) -> Offset | None:
    """From an answer's headers, by this host's clock before and after; None: it says no time."""
    try:
        if TIME in headers:
            first = last = float(headers[TIME])
        else:
            first = parsedate_to_datetime(headers["date"]).timestamp()
            last = first + DATE_S
    except (KeyError, ValueError):
        return None
    return Offset(asked - last, answered - first)


def span(seconds: float) -> str:
    """How long, in the largest unit of which there are two, or one, to one digit below ten."""
    size, unit = next((pair for pair in UNITS if seconds >= 1.95 * pair[0]), UNITS[-1])
    count = seconds / size
    return f"{count:.0f} {unit}" if count >= 9.95 else f"{count:.1f} {unit}".replace(".0 ", " ")
