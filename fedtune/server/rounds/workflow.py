"""What a round is. `run_rounds.py` keeps history, best, retries and durable state for all of them.

    workflow.play(number, attempt, members, state)   the next global parameters, or why not
    workflow.score(number, members, state)           how good they are

`central` is here: the server asks clients, and aggregates. Others are found by entry point in the
group `fedtune.workflows`: a callable that takes a `Setting` and returns a `Workflow`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.results.round_record import FailedAttempt, Refusal
from fedtune.server.checkpoint import ServerState
from fedtune.server.plan import Plan
from fedtune.server.rounds.bounds import DEFAULT, Bounds
from fedtune.server.rounds.evaluation import Scores
from fedtune.server.rounds.exchange import Exchange
from fedtune.strategies.memory import ServerMemory
from fedtune.strategies.method import Method
from fedtune.transport.messages import Member

__all__ = ["AttemptFailedError", "Played", "Setting", "Workflow"]


@dataclass(frozen=True)
class Setting:
    """All that a workflow works with.

    Attributes:
        exchange: how updates and scores come in.
        method: of the run.
        plan: rounds and budgets.
        fraction_train: share of the clients asked in a round.
        min_replies: good updates needed: a number, a fraction of those asked, or None for all.
        bounds: of what one client's reply may do.
    """

    exchange: Exchange
    method: Method
    plan: Plan
    fraction_train: float = 1.0
    min_replies: str | None = None
    bounds: Bounds = DEFAULT


@dataclass(frozen=True)
class Played:
    """A round that has come to something.

    Attributes:
        params: the next global parameters.
        manifest: what they obey.
        memory: the method's.
        rounds: client -> the round that its accepted update is of.
        samples: rows trained on, over all clients.
        tokens: label tokens trained on, over all clients.
        train_loss: mean over the tokens.
        figures: more of the round's record (`RoundRecord`), by field.
        refused: updates that were not taken.
        train_s, wait_s, codec_s, aggregate_s: where the time went.
    """

    params: dict[str, Tensor]
    manifest: Manifest
    memory: ServerMemory
    rounds: Mapping[str, int]
    samples: int
    tokens: int
    train_loss: float | None
    figures: Mapping[str, Any]
    refused: Sequence[Refusal] = ()
    train_s: float = 0.0
    wait_s: float = 0.0
    codec_s: float = 0.0
    aggregate_s: float = 0.0


class AttemptFailedError(Exception):
    """An attempt at a round has come to nothing; it may be made again.

    Args:
        failure: for the coordinator.
        told: for everybody; what sites have said is marked as private in it.
    """

    def __init__(self, failure: FailedAttempt, told: str) -> None:
        super().__init__(failure.reason)
        self.failure, self.told = failure, told


class Workflow(Protocol):
    """What a round is. One lives as long as a run."""

    def play(
        self, number: int, attempt: int, members: Sequence[Member], state: ServerState
    ) -> Played:
        """Play a round from `state`, which stays as it is; raises AttemptFailedError."""

    def score(self, number: int, members: Sequence[Member], state: ServerState) -> Scores:
        """Scores of the parameters in `state`; raises RoundError where there is none."""
