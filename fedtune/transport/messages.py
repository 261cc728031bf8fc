"""What server and client say to each other, as plain dataclasses and as Flower records.

query.plan      rounds and budgets       -> name and manifest of the client
query.initial   -> the first global parameters and their manifest, from one client
query.setup     manifest, static tensors -> name of the client
train           global parameters, task  -> updated parameters, what was trained on
evaluate        global parameters        -> metrics on the held-out set
query.finish    last global parameters, why the run is over -> name of the client

Beside the parameters (record `arrays`) travel, where the method asks for it: `control`, the control
variate of SCAFFOLD and what the client changes it by; `base`, what has been added to the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.errors import ManifestError
from fedtune.transport.records import config_of, params_of, to_arrays

__all__ = [
    "ARRAYS",
    "BASE",
    "CONTROL",
    "DONE",
    "EVALUATE",
    "FINISH",
    "INITIAL",
    "MOST_LENGTH",
    "MOST_STEPS",
    "PLAN",
    "SETUP",
    "TRAIN",
    "UNKNOWN",
    "Declared",
    "EvaluateTask",
    "Member",
    "PlanTask",
    "RoundTask",
    "arrays_of",
    "pack",
]

PLAN, INITIAL, SETUP = "query.plan", "query.initial", "query.setup"
TRAIN, EVALUATE, FINISH = "train", "evaluate", "query.finish"
ARRAYS, CONTROL, BASE = "arrays", "control", "base"
DONE = "done"  # why a run is over that went well


# What a site can hold at most, whatever it says.
MOST_ROWS, MOST_STEPS, MOST_LENGTH = 10**10, 10**7, 2**24


@dataclass(frozen=True)
class Declared:
    """What a client says before the first round that it can train in one; 0 where it cannot tell.

    Attributes:
        rows: that it has.
        steps: optimizer steps of a round.
        rows_per_step: at most.
        tokens_per_step: label tokens, or what stands for them, at most.
    """

    rows: int = 0
    steps: int = 0
    rows_per_step: int = 0
    tokens_per_step: int = 0

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Declared:
        """From the answer to a plan; ManifestError where no site can have so much."""
        found = cls(**{item.name: _whole(config, item.name) for item in fields(cls)})
        length = MOST_LENGTH * (found.rows_per_step or MOST_ROWS)
        most = (MOST_ROWS, MOST_STEPS, MOST_ROWS, length)
        for (name, value), bound in zip(asdict(found).items(), most, strict=True):
            if not 0 <= value <= bound:
                raise ManifestError(
                    f"{name}: expected 0 to {bound}, received {value}. Lower it at the site."
                )
        return found


def _whole(config: Mapping[str, object], name: str) -> int:
    value = config.get(name, 0)
    if not isinstance(value, int):
        raise ManifestError(f"{name}: expected a whole number, received {value!r}.")
    return value


UNKNOWN = Declared()


@dataclass(frozen=True)
class Member:
    """A node that takes part.

    Attributes:
        evaluates: whether it can score the global parameters.
        manifest: its adapter, where that differs from the run's: in ranks only.
        declared: what it can train in a round.
    """

    node: int
    name: str
    evaluates: bool = True
    manifest: Manifest | None = None
    declared: Declared = UNKNOWN


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

    @classmethod
    def of(cls, content: RecordDict) -> PlanTask:
        """From the config record of a message."""
        return cls(**dict(config_of(content)))  # type: ignore[arg-type]


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
        frozen: trained tensors that stand still in this round; they are not sent back.
        personal: tensors that the client keeps for itself; it has its own, or starts from those
            sent with the round.
        correction: name of what is added to the gradients; "" for nothing.
        correction_settings: its numbers, as JSON.
        new_factors: the parameters are not those that the client's optimizer knows, so that its
            moments begin anew.
        adds_to_base: the method adds to the base; from the second round on, what it has added so
            far comes with the parameters.
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
    frozen: list[str] = field(default_factory=list)
    personal: list[str] = field(default_factory=list)
    correction: str = ""
    correction_settings: str = "{}"
    new_factors: bool = False
    adds_to_base: bool = False

    def record(self) -> ConfigRecord:
        """As a config record."""
        return ConfigRecord(asdict(self))

    @classmethod
    def of(cls, content: RecordDict) -> RoundTask:
        """From the config record of a message."""
        return cls(**dict(config_of(content)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class EvaluateTask:
    """One client's evaluation of the global parameters.

    Attributes:
        run: id of the run.
        round: after which the parameters are the global ones.
        manifest: hash of the manifest that the parameters obey.
        resume_round: last round in which the server took this client's update; 0 for none.
        personal: tensors of which the client takes its own, of that round.
    """

    run: str
    round: int
    manifest: str
    resume_round: int = 0
    personal: list[str] = field(default_factory=list)

    def record(self) -> ConfigRecord:
        """As a config record."""
        return ConfigRecord(asdict(self))

    @classmethod
    def of(cls, content: RecordDict) -> EvaluateTask:
        """From the config record of a message."""
        return cls(**dict(config_of(content)))  # type: ignore[arg-type]


Arrays = ArrayRecord | Mapping[str, Tensor]


def pack(
    *,
    arrays: Arrays | None = None,
    extras: Mapping[str, Arrays] | None = None,
    base: Arrays | None = None,
    metrics: Mapping[str, float] | None = None,
    config: ConfigRecord | Mapping[str, str | int | float | bool] | None = None,
) -> RecordDict:
    """The records of a message; absent and empty ones are left out."""
    content = RecordDict()
    if arrays is not None:
        content[ARRAYS] = arrays if isinstance(arrays, ArrayRecord) else to_arrays(arrays)
    for name, more in (*(extras or {}).items(), (BASE, base)):
        if more:
            content[name] = more if isinstance(more, ArrayRecord) else to_arrays(more)
    if metrics is not None:
        content["metrics"] = MetricRecord(dict(metrics))
    if config is not None:
        content["config"] = (
            config if isinstance(config, ConfigRecord) else ConfigRecord(dict(config))
        )
    return content


def arrays_of(content: RecordDict, name: str = ARRAYS) -> dict[str, Tensor]:
    """The tensors of one array record; empty when there is none. Raises ManifestError."""
    record = content.array_records.get(name)
    return params_of(record) if record else {}
