"""What came back in a round, and how much of it is enough."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from fedtune.results.round_record import Refusal
from fedtune.server.rounds.check_update import Update
from fedtune.server.rounds.norms import NORM, norm_key

__all__ = ["CUT_FROM", "RoundResult", "needed_replies", "sample_clients"]

CUT_FROM = "weight_cut_from"  # what a client would have weighed, in its reply's record


@dataclass
class RoundResult:
    """What came back in one attempt of a round."""

    asked: list[str]
    replies: list[dict[str, float | int | str | None]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    aggregate_s: float = 0.0
    train_s: float = 0.0
    update_norm: float | None = None
    client_drift: float | None = None
    residual: float | None = None
    residual_fedavg: float | None = None
    server_rate: float | None = None  # where it was cut
    problem: str = ""  # of the server's own step
    rounds: dict[str, int] = field(default_factory=dict)  # that the accepted updates are of

    def take(self, client: str, update: Update, client_round: int, cut_from: float | None) -> None:
        """Note an accepted update, of this round or of an earlier one.

        Args:
            cut_from: the weight that it asked for, where that was cut to `most_weight`.
        """
        stats = update.stats
        cut = {"weight": stats.most_weight, CUT_FROM: cut_from} if cut_from else {}
        clipped = {"norm_clipped_from": update.clipped_from} if update.clipped_from else {}
        extras = {norm_key(name): norm for name, norm in update.extra_norms.items()}
        self.rounds[client] = client_round
        self.replies.append(
            {
                "client": client,
                "round": client_round,
                "examples": stats.num_examples,
                "tokens": stats.num_tokens,
                "steps": stats.num_steps,
                "train_loss": update.train_loss,
                "train_s": round(update.train_s, 4),
                NORM: math.sqrt(update.squared_norm),
                **extras,
                **clipped,
                **cut,
            }
        )
        self.train_s += update.train_s

    @property
    def longest(self) -> str:
        """Whose accepted update is the longest, in words."""
        found = max(self.replies, key=lambda reply: float(reply[NORM] or 0.0))
        return f"{found['client']}'s, norm {float(found[NORM] or 0.0):.4g}"

    def total(self, key: str) -> int:
        """Sum of a count over the accepted replies."""
        return sum(int(reply[key] or 0) for reply in self.replies)

    @property
    def train_loss(self) -> float | None:
        """Mean training loss over the round, weighted by tokens."""
        known = [
            (float(reply["train_loss"]), int(reply["tokens"] or 0))
            for reply in self.replies
            if reply["train_loss"] is not None
        ]
        tokens = sum(weight for _, weight in known)
        return sum(loss * weight for loss, weight in known) / tokens if tokens else None


def sample_clients(names: Iterable[str], count: int, key: str) -> list[str]:
    """The same names, count and key give the same sample, whatever order the names arrive in."""
    return sorted(random.Random(key).sample(sorted(names), count))


def needed_replies(min_replies: str | None, asked: int) -> int:
    """`None` -> all asked; `"3"` -> 3; `"0.5"` -> half of those asked, rounded up."""
    if min_replies is None:
        return asked
    if "." in min_replies:
        return max(1, math.ceil(Fraction(min_replies) * asked))
    return int(min_replies)
