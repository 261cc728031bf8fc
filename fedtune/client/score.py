"""What an evaluation has found, and on how many rows and label tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["HeldOut", "Score"]


class HeldOut(NamedTuple):
    """Size of a held-out set."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class Score:
    """An evaluation of all held-out sets.

    Attributes:
        metrics: as the Trainer reports them; of several sets `eval_loss` is the mean by tokens.
        size: rows and label tokens of all sets.
        sets: the sizes of several sets, by the prefix of their metrics; empty for a single one.
    """

    metrics: dict[str, float]
    size: HeldOut
    sets: dict[str, HeldOut] = field(default_factory=dict)
