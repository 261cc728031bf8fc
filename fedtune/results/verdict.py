"""What the comparison of the arms says in numbers: `verdict` in `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fedtune.results.values import count, items, mapping, number

__all__ = ["OwnGain", "OwnRow", "Parity", "Spread", "Verdict"]

ARMS = ("local", "federated", "centralized")  # that are scored on a client's own rows


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; `std` is None for one seed, both after a loss."""

    mean: float | None
    std: float | None = None

    @classmethod
    def from_json(cls, raw: object) -> Self | None:
        """The spread in a JSON object; None where there is none or its mean is not known."""
        plain = mapping(raw)
        mean = number(plain.get("mean"))
        return None if mean is None else cls(mean, number(plain.get("std")))


@dataclass(frozen=True)
class OwnRow:
    """A client's losses on its own held-out rows at the end.

    Attributes:
        losses: by arm, None where that arm diverged or the client has no such rows.
        gain_pct: of federated over local.
    """

    client: str
    rows: float | None = None
    losses: Mapping[str, float | None] = field(default_factory=dict)
    gain_pct: float | None = None

    def to_json(self) -> dict[str, Any]:
        """`{"client": ..., "rows": ..., "local": ..., ..., "gain_pct": ...}`."""
        head = {"client": self.client, "rows": self.rows}
        return {**head, **self.losses, "gain_pct": self.gain_pct}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], index: int) -> Self:
        """The row in a JSON object; a client without a name is called by its `index`."""
        losses = {arm: number(raw[arm]) for arm in ARMS if arm in raw}
        name, rows = str(raw.get("client", index)), number(raw.get("rows"))
        return cls(name, rows, losses, number(raw.get("gain_pct")))


@dataclass(frozen=True)
class OwnGain:
    """Gain over local on each client's own rows; the spread is over seeds, of clients' means."""

    spread: Spread
    clients: tuple[OwnRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`{"mean": ..., "std": ..., "clients": [...]}`."""
        return {**asdict(self.spread), "clients": [row.to_json() for row in self.clients]}

    @classmethod
    def from_json(cls, raw: object) -> Self | None:
        """The gain in a JSON object, None where there is none."""
        plain = mapping(raw)
        rows = map(mapping, items(plain.get("clients")))
        clients = tuple(OwnRow.from_json(row, index) for index, row in enumerate(rows))
        return cls(Spread.from_json(plain) or Spread(None), clients) if plain else None


@dataclass(frozen=True)
class Parity:
    """One federated client against the plain Trainer."""

    identical: bool
    first_diff_step: int | None = None

    @classmethod
    def from_json(cls, raw: object) -> Self | None:
        """The comparison in a JSON object, None where there is none."""
        plain = mapping(raw)
        if plain.get("identical") is None:
            return None
        return cls(plain["identical"] is True, count(plain.get("first_diff_step")))


@dataclass(frozen=True)
class Verdict:
    """Gaps and gains in percent, controls and cost; None where the arm was not run.

    Attributes:
        equal_samples: of arms that are read by samples, whether each ends within a batch.
        bytes_ratio_full: bytes sent, as a share of exchanging the full model as often.
        time_split: seconds of the federated arm by activity, mean over seeds.
    """

    gap_centralized_pct: Spread | None = None
    gap_large_batch_pct: Spread | None = None
    gain_over_local_pct: Spread | None = None
    equal_samples: Mapping[str, bool] = field(default_factory=dict)
    gain_over_local_own_pct: OwnGain | None = None
    parity: Parity | None = None
    bytes_ratio_full: float | None = None
    time_split: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object in the summary."""
        own = self.gain_over_local_own_pct
        return asdict(self) | {"gain_over_local_own_pct": own.to_json() if own else None}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The verdict in its object."""
        times = {name: number(value) for name, value in mapping(raw.get("time_split")).items()}
        equal = mapping(raw.get("equal_samples"))
        return cls(
            gap_centralized_pct=Spread.from_json(raw.get("gap_centralized_pct")),
            gap_large_batch_pct=Spread.from_json(raw.get("gap_large_batch_pct")),
            gain_over_local_pct=Spread.from_json(raw.get("gain_over_local_pct")),
            equal_samples={arm: same is True for arm, same in equal.items()},
            gain_over_local_own_pct=OwnGain.from_json(raw.get("gain_over_local_own_pct")),
            parity=Parity.from_json(raw.get("parity")),
            bytes_ratio_full=number(raw.get("bytes_ratio_full")),
            time_split={name: seconds for name, seconds in times.items() if seconds is not None},
        )

    @property
    def own(self) -> tuple[OwnRow, ...]:
        """Each client on its own held-out rows; empty where nobody was scored on them."""
        return self.gain_over_local_own_pct.clients if self.gain_over_local_own_pct else ()
