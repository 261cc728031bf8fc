"""What the report knows of a run, as frozen records; None stands for a missing number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Arm",
    "ClientData",
    "OwnRow",
    "Parity",
    "Refusal",
    "RoundRow",
    "Series",
    "Spread",
    "Summary",
    "Values",
    "Verdict",
    "WireBytes",
    "final",
    "last",
]

Values = tuple[float | None, ...]


def last(values: Values) -> float | None:
    """The last known value."""
    return next((value for value in reversed(values) if value is not None), None)


def final(values: Values) -> float | None:
    """The value after the last round; None without a round, or where a training diverged."""
    return values[-1] if len(values) > 1 else None


@dataclass(frozen=True)
class Series:
    """One value per round; index 0 is the initial adapter. Bytes and seconds are per round."""

    eval_loss: Values = ()
    train_loss: Values = ()
    samples: Values = ()
    tokens: Values = ()
    bytes_up: Values = ()
    bytes_down: Values = ()
    bytes_up_raw: Values = ()
    bytes_down_raw: Values = ()
    wall_s: Values = ()
    metrics: Mapping[str, Values] = field(default_factory=dict)  # accuracy, F1, ...


@dataclass(frozen=True)
class Arm:
    """One arm: mean over seeds, one series per seed and, for `local`, one per client."""

    name: str
    mean: Series
    runs: tuple[Series, ...] = ()
    clients: tuple[Series, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; `std` is None for one seed."""

    mean: float | None
    std: float | None = None


@dataclass(frozen=True)
class OwnRow:
    """A client's losses on its own held-out rows at the end, by arm; none without such rows."""

    client: str
    rows: float | None = None
    local: float | None = None
    federated: float | None = None
    centralized: float | None = None
    gain_pct: float | None = None  # of federated over local


@dataclass(frozen=True)
class Parity:
    """One federated client against the plain Trainer."""

    identical: bool
    first_diff_step: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The rows of DESIGN §6; None where the arm was not run."""

    gap_centralized_pct: Spread | None = None
    gap_large_batch_pct: Spread | None = None
    gain_over_local_pct: Spread | None = None
    equal_samples: Mapping[str, bool] = field(default_factory=dict)
    gain_over_local_own_pct: Spread | None = None
    own: tuple[OwnRow, ...] = ()
    parity: Parity | None = None
    bytes_ratio_full: float | None = None
    time_split: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientData:
    """What one client owns."""

    client: str
    rows: float | None = None
    tokens: float | None = None
    labels: Mapping[str, float] = field(default_factory=dict)
    owned: tuple[str, ...] = ()  # values of the partition column


@dataclass(frozen=True)
class Summary:
    """A `summary.json` and where it lies."""

    directory: Path
    arms: Mapping[str, Arm]
    verdict: Verdict
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    clients: tuple[ClientData, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)  # what was read, by content
    model: Mapping[str, Any] = field(default_factory=dict)  # base model and tokenizer, by content
    notes: tuple[str, ...] = ()  # warnings about the rows
    extra: Mapping[str, Any] = field(default_factory=dict)
    base_loss: float | None = None  # held-out loss of the base model without an adapter

    @property
    def federated(self) -> Arm:
        """The arm that every summary has; empty before anything was scored."""
        return self.arms["federated"]

    @property
    def rounds(self) -> int:
        """Finished rounds R."""
        return max(0, len(self.federated.mean.eval_loss) - 1)

    @property
    def status(self) -> str:
        """`completed`, `failed`, `interrupted` or `killed`."""
        return str(self.extra.get("status") or "completed")

    @property
    def seed_names(self) -> tuple[str, ...]:
        """Of each series in `federated.runs`; positions where they were not written."""
        named = self.extra.get("means_over_seeds") or self.extra.get("seeds")
        if isinstance(named, list) and len(named) == self.seeds:
            return tuple(map(str, named))
        return tuple(f"#{index}" for index in range(self.seeds))

    @property
    def seeds(self) -> int:
        """How many seeds the means are over."""
        return max(1, len(self.federated.runs))

    @property
    def start(self) -> str:
        """What index 0 of every series is, which a prompt makes unlike the base model."""
        return "initial model" if self.setting("peft_method") == "none" else "initial adapter"

    def setting(self, name: str) -> str | None:
        """A setting by its flag name, from the top level, `config` or one of its groups."""
        groups = [value for value in self.config.values() if isinstance(value, Mapping)]
        for place in (self.extra, self.config, *groups):
            if not isinstance(place.get(name), Mapping | list | None):
                return str(place[name])
        return None


@dataclass(frozen=True)
class Refusal:
    """One update that was left out, and in which attempt at its round."""

    who: str
    reason: str
    attempt: int = 1


@dataclass(frozen=True)
class WireBytes:
    """Bytes on the wire, and of the same records without a codec."""

    up: float | None = None
    down: float | None = None
    up_raw: float | None = None
    down_raw: float | None = None

    @property
    def sent(self) -> float | None:
        """Both directions."""
        return _sum(self.up, self.down)

    @property
    def raw(self) -> float | None:
        """Both directions without a codec."""
        return _sum(self.up_raw, self.down_raw)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None and other is None else (one or 0) + (other or 0)


@dataclass(frozen=True)
class RoundRow:
    """One line of `rounds.jsonl`."""

    round: int | None
    attempt: int | None = None
    eval_loss: float | None = None
    asked: int | None = None
    replies: int | None = None
    refused: tuple[Refusal, ...] = ()
    update_norm: float | None = None
    client_drift: float | None = None
    residual: float | None = None
    time_split: Mapping[str, float] = field(default_factory=dict)
    bytes_up: float | None = None
    bytes_down: float | None = None
    clients: Mapping[str, WireBytes] = field(default_factory=dict)
