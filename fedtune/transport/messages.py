"""What server and client say to each other, as plain dataclasses and as Flower records.

query.initial   -> the first global parameters and their manifest, from one client
query.setup     manifest, static tensors -> name and rows of the client
train           global parameters, task  -> updated parameters, what was trained on
evaluate        global parameters        -> metrics on the held-out set
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedtune.transport.records import config_of, to_arrays

__all__ = ["EVALUATE", "INITIAL", "SETUP", "TRAIN", "RoundTask", "pack"]

INITIAL, SETUP, TRAIN, EVALUATE = "query.initial", "query.setup", "train", "evaluate"


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
