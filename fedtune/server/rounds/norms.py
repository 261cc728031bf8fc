"""How long an update may be, which is known before it is folded: a sum cannot take one back.

    |y_k - x| <= 10 m min(max(1, steps_k / s), 10),   m, s: medians over the last 5 rounds

of the accepted updates' norms and steps, and never below a floor. A round in which nothing moved (a
learning rate of 0) says nothing of m and is left out, as are rounds in which other tensors trained.
Until 3 rounds are known the bound is 10^3 (1 + |x|): a learning rate that is merely too high is to
be seen as divergence. Where most clients of an attempt are above it, the round itself has changed
(a schedule that restarts), and the next attempt goes by their median. x is what the client was
sent, in its own space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = [
    "FIRST",
    "NORM",
    "Bound",
    "Record",
    "bound_of",
    "norm_key",
]

TIMES, ROUNDS, LEAST_ROUNDS = 10.0, 5, 3
FLOOR = 1e-2
FIRST = 1e3
MOST_STEPS_TIMES = 10.0  # a client with more steps than others may move further, up to that

NORM = "norm"  # of one reply, in the record of a round; of an extra: `norm_key`

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Bound:
    """On the updates of one attempt.

    Attributes:
        usual: median norm of earlier rounds, or of this one; None where too little is known.
        steps: median number of steps behind it.
        first: 10^3 (1 + |x|), asked for only where `usual` is None or of this round.
        absolute: what the user allows, or None.
        of_this_round: whether `usual` is of an earlier attempt at this round.
    """

    usual: float | None
    steps: float
    first: Callable[[], float]
    absolute: float | None = None
    of_this_round: bool = False

    def most(self, steps: int) -> tuple[float, str]:
        """The longest update after so many steps, and why."""
        found, why = self._by_rounds(steps)
        if self.absolute is not None and self.absolute < found:
            return self.absolute, "--max_update_norm"
        return found, why

    def _by_rounds(self, steps: int) -> tuple[float, str]:
        if self.usual is None:
            return self.first(), "10^3 x (1 + the global's norm), until three rounds are known"
        more = min(max(1.0, steps / self.steps), MOST_STEPS_TIMES) if self.steps else 1.0
        most = max(TIMES * self.usual * more, FLOOR)
        if self.of_this_round:
            return min(most, self.first()), "10 x the median of this round"
        return most, "10 x the median of the last rounds"


def bound_of(
    rounds: Sequence[Record],
    key: str,
    *,
    first: Callable[[], float],
    absolute: float | None = None,
    risen: float | None = None,
) -> Bound:
    """The bound that finished rounds ask for.

    Args:
        rounds: their records, of rounds in which the same tensors trained; oldest first.
        key: which norm of a reply.
        risen: median of an earlier attempt at this round, where most were above the bound.
    """
    moved = [moves for record in rounds if (moves := _moves(record, key))][-ROUNDS:]
    if len(moved) < LEAST_ROUNDS:
        return Bound(None, 0.0, first, absolute)
    every = [move for moves in moved for move in moves]
    usual, steps = (median(values) for values in zip(*every, strict=True))
    if risen is not None and risen > usual:
        return Bound(risen, steps, first, absolute, of_this_round=True)
    return Bound(usual, steps, first, absolute)


def _moves(record: Record, key: str) -> list[tuple[float, int]]:
    """Norm and steps of each update of a round that moved at all."""
    replies = record.get("replies", ())
    return [(reply[key], reply["steps"]) for reply in replies if reply.get(key)]


def norm_key(extra: str) -> str:
    """Where the norm of an extra stands in the record of a reply: `control_norm`."""
    return f"{extra}_norm"
