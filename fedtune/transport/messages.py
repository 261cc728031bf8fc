"""What server and client say to each other, as plain dataclasses and as Flower records.

query.plan      rounds and budgets       -> name and manifest of the client
query.initial   -> the first global parameters and their manifest, from one client
query.setup     manifest, static tensors -> name of the client
train           global parameters, task  -> updated parameters, what was trained on
evaluate        global parameters        -> metrics on the held-out set
query.finish    last global parameters, why the run is over -> name of the client
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedtune.transport.records import config_of, to_arrays

__all__ = [
    "EVALUATE",
    "FINISH",
    "INITIAL",
    "PLAN",
    "SETUP",
    "TRAIN",
    "Member",
    "PlanTask",
    "RoundTask",
    "pack",
]

PLAN, INITIAL, SETUP = "query.plan", "query.initial", "query.setup"
TRAIN, EVALUATE, FINISH = "train", "evaluate", "query.finish"


@dataclass(frozen=True)
class Member:
    """A node that takes part, and whether it can score the global parameters."""

    node: int
    name: str
    evaluates: bool = True


@dataclass(frozen=True)
class PlanTask:
    """A whole run, as every client hears of it first.

    Attributes:
        run: id of the run; a client keeps its state per run.
        steps: optimizer steps per round, or 0 when `epochs` counts.
        epochs: passes over the client's rows per round, or 0.
        carry: whether optimizer, scheduler, RNG and data position continue over rounds.
        idle_timeout_s: how long a client waits without a word from the server.
        version: fedtune's version at the server.
    """

    run: str
    num_rounds: int
    steps: int
    epochs: float
    carry: bool
    seed: int
    idle_timeout_s: float
    version: str

    def record(self) -> ConfigRecord:
        """As a config record."""
        return ConfigRecord(asdict(self))


@dataclass(frozen=True)
class RoundTask:
    """One round of one client.

    Attributes:
        run: id of the run; a client keeps its state per run.
        round: 1..num_rounds.
        attempt: 1, or more when the round is retried.
        manifest: hash of the manifest that the parameters obey.
        steps: optimizer steps, or 0 when `epochs` counts.
        epochs: passes over the client's rows, or 0.
        carry: whether optimizer, scheduler, RNG and data position continue.
        resume_round: last round in which the server took this client's update; 0 for none.
        keep_rounds: rounds whose client state the server may still roll back to.
    """

    run: str
    round: int
    num_rounds: int
    attempt: int
    manifest: str
    steps: int
    epochs: float
    carry: bool
    seed: int
    resume_round: int = 0
    keep_rounds: list[int] = field(default_factory=list)

    def record(self) -> ConfigRecord:
        """As a config record."""
        return ConfigRecord(asdict(self))

    @classmethod
    def of(cls, content: RecordDict) -> RoundTask:
        """From the config record of a message."""
        return cls(**dict(config_of(content)))  # type: ignore[arg-type]


def pack(
    *,
    arrays: ArrayRecord | Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, float] | None = None,
    config: ConfigRecord | Mapping[str, str | int | float | bool] | None = None,
) -> RecordDict:
    """One parameter record, one metrics record and one config record; absent ones are left out."""
    content = RecordDict()
    if arrays is not None:
        content["arrays"] = arrays if isinstance(arrays, ArrayRecord) else to_arrays(arrays)
    if metrics is not None:
        content["metrics"] = MetricRecord(dict(metrics))
    if config is not None:
        content["config"] = (
            config if isinstance(config, ConfigRecord) else ConfigRecord(dict(config))
        )
    return content
