"""`summary.json`: how a run ended, its arms, the verdict, and what it was run on and with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fedtune.errors import FedtuneError
from fedtune.files import read_json
from fedtune.results.round_record import Refusal
from fedtune.results.series import Series
from fedtune.results.values import count, items, mapping, number
from fedtune.results.verdict import Verdict

__all__ = ["SUMMARY", "Arm", "ClientData", "Ending", "LastRefusal", "Summary", "load_summary"]

SUMMARY = "summary.json"
COMPLETED = "completed"


@dataclass(frozen=True)
class Arm:
    """One arm: mean over seeds, one series per seed and, for `local`, one per client."""

    mean: Series
    runs: tuple[Series, ...] = ()
    clients: Mapping[str, Series] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The arm's object in the summary."""
        clients = [{"client": name, **one.to_json()} for name, one in self.clients.items()]
        runs = [run.to_json() for run in self.runs]
        return {
            **self.mean.to_json(),
            "runs": runs,
            **({"clients": clients} if clients else {}),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The arm in its object."""
        clients = {
            str(one.get("client", index)): Series.from_json(one)
            for index, one in enumerate(map(mapping, items(raw.get("clients"))))
        }
        runs = tuple(Series.from_json(mapping(run)) for run in items(raw.get("runs")))
        return cls(Series.from_json(raw), runs, clients)

    def members(self, name: str) -> Sequence[Series]:
        """Series that the mean of the arm `name` is over: clients for `local`, else seeds."""
        return tuple(self.clients.values()) if name == "local" and self.clients else self.runs


@dataclass(frozen=True)
class LastRefusal:
    """An update refused in the round that never came about, and in which attempt at it."""

    round: int | None
    attempt: int
    refusal: Refusal

    def to_json(self) -> dict[str, Any]:
        """As `summary.json` holds it."""
        return {"round": self.round, "attempt": self.attempt, **asdict(self.refusal)}

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """The refusal in a JSON object."""
        plain = mapping(raw)
        attempt = count(plain.get("attempt")) or 1
        return cls(count(plain.get("round")), attempt, Refusal.from_json(plain))


@dataclass(frozen=True)
class Ending:
    """How a run, or one of its seeds, ended.

    Attributes:
        status: completed, failed, interrupted, killed or, of a seed, `not run`.
        reason: in words, where it did not complete.
        where: in the run (`in round 2 of 5`), where it did not complete.
        refused: None where it did not end in a round.
    """

    status: str = COMPLETED
    reason: str | None = None
    where: str | None = None
    refused: tuple[LastRefusal, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys that there is something to say under."""
        refused = None if self.refused is None else [one.to_json() for one in self.refused]
        told = {"status": self.status, "reason": self.reason or None}
        told |= {"where": self.where, "refused": refused}  # type: ignore[dict-item]
        return {name: value for name, value in told.items() if value is not None}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The ending in a summary, or in a seed's part of one."""
        refused = raw.get("refused")
        reason, where = (None if raw.get(key) is None else str(raw[key]) for key in _WORDS)
        return cls(
            str(raw.get("status") or COMPLETED),
            reason,
            where,
            tuple(map(LastRefusal.from_json, refused)) if isinstance(refused, list) else None,
        )


_WORDS = ("reason", "where")


@dataclass(frozen=True)
class ClientData:
    """What one client owns."""

    client: str
    rows: float | None = None
    tokens: float | None = None
    labels: Mapping[str, float] = field(default_factory=dict)
    owned: tuple[str, ...] = ()  # values of the partition column

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], index: int) -> Self:
        """The client in `data.clients`; one without a name is called by its `index`."""
        labels = {k: n for k, v in mapping(raw.get("labels")).items() if (n := number(v))}
        rows, tokens = number(raw.get("rows")), number(raw.get("tokens"))
        owned = tuple(map(str, items(raw.get("owned"))))
        return cls(str(raw.get("client", index)), rows, tokens, labels, owned)


@dataclass(frozen=True)
class Summary:
    """A `summary.json`, in the order of its keys.

    Attributes:
        endings: of each of several seeds.
        over: the seeds that the means are over, None for a run of one seed.
        run_with: strategy, engine and codec, with the codec's settings as they were in effect.
        base_loss: held-out loss of the base model without an adapter.
        data: what was read, by content, with what each client owns and warnings about the rows.
        model: base model and tokenizer, by content.
        config: every setting by group.
        directory: where the file lies, which is not in it.
    """

    ending: Ending = Ending()
    endings: Mapping[int, Ending] = field(default_factory=dict)
    over: Sequence[int] | None = None
    run_with: Mapping[str, Any] = field(default_factory=dict)
    asked_seeds: Sequence[int] = ()
    base_loss: float | None = None
    arms: Mapping[str, Arm] = field(default_factory=dict)
    verdict: Verdict = Verdict()
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    directory: Path = Path()

    def to_json(self) -> dict[str, Any]:
        """The whole file; without a round there is neither an arm nor a verdict."""
        several: dict[str, Any] = {}
        if self.over is not None:
            runs = [{"seed": seed, **one.to_json()} for seed, one in self.endings.items()]
            several = {"runs": runs, "means_over_seeds": list(self.over)}
        return {
            **self.ending.to_json(),
            **several,
            **self.run_with,
            "seeds": list(self.asked_seeds),
            "base_loss": self.base_loss,
            "arms": {name: arm.to_json() for name, arm in self.arms.items()},
            "verdict": self.verdict.to_json() if self.arms else {},
            "data": self.data,
            "model": self.model,
            "config": self.config,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, raw: object, path: Path) -> Self:
        """The summary in the JSON value of the file at `path`; FedtuneError: it is none."""
        if not isinstance(raw, dict) or not isinstance(raw.get("arms"), dict):
            raise _unknown(path, 'an object with "arms"')
        for name, arm in raw["arms"].items():
            if not isinstance(arm, dict):
                raise _unknown(path, f'arm "{name}" to be an object')
        arms = {name: Arm.from_json(arm) for name, arm in raw["arms"].items()}
        ending, data = Ending.from_json(raw), mapping(raw.get("data"))
        if not arms and ending.status != COMPLETED:
            arms = {"federated": Arm(Series())}
        elif "federated" not in arms or not arms["federated"].mean.eval_loss:
            raise _unknown(path, 'an arm "federated" with "eval_loss"')
        over, runs = raw.get("means_over_seeds"), enumerate(map(mapping, items(raw.get("runs"))))
        return cls(
            ending=ending,
            endings={run.get("seed", index): Ending.from_json(run) for index, run in runs},
            over=over if isinstance(over, list) else None,
            run_with={name: value for name, value in raw.items() if name not in NOT_RUN_WITH},
            asked_seeds=items(raw.get("seeds")),
            base_loss=number(raw.get("base_loss")),
            arms=arms,
            verdict=Verdict.from_json(mapping(raw.get("verdict"))),
            data=data,
            model=mapping(raw.get("model")),
            config=mapping(raw.get("config")),
            versions=mapping(raw.get("versions")),
            directory=path.parent,
        )

    @property
    def federated(self) -> Arm:
        """The arm that every summary has; empty before anything was scored."""
        return self.arms["federated"]

    @property
    def clients(self) -> tuple[ClientData, ...]:
        """What each client owns; empty where clients are at sites."""
        found = map(mapping, items(self.data.get("clients")))
        return tuple(ClientData.from_json(one, index) for index, one in enumerate(found))

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the rows."""
        return tuple(map(str, items(self.data.get("notes"))))

    @property
    def rounds(self) -> int:
        """Number of finished rounds."""
        return max(0, len(self.federated.mean.eval_loss) - 1)

    @property
    def status(self) -> str:
        """`completed`, `failed`, `interrupted` or `killed`."""
        return self.ending.status

    @property
    def seed_names(self) -> tuple[str, ...]:
        """Name of the seed of each series in `federated.runs`."""
        named = self.over or self.asked_seeds
        if len(named) == self.seeds:
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
        """A setting by its flag name: as it was in effect, else as `config` or a group has it."""
        groups = [value for value in self.config.values() if isinstance(value, Mapping)]
        for place in (self.run_with, self.config, *groups):
            if not isinstance(place.get(name), Mapping | list | None):
                return str(place[name])
        return None


NOT_RUN_WITH = {
    *("status", "reason", "where", "refused", "runs", "means_over_seeds"),
    *("seeds", "base_loss", "arms", "verdict", "data", "model", "config", "versions"),
}


def load_summary(directory: str | Path) -> Summary:
    """Read `directory/summary.json`."""
    path = Path(directory) / SUMMARY
    if not path.is_file():
        raise FedtuneError(
            f"{directory}: expected the output directory of a finished run, found no summary.json. "
            "Pass the --output_dir of a run that ended."
        )
    try:
        raw = read_json(path)
    except ValueError as error:
        raise _unknown(path, f"JSON, received {error}") from None
    return Summary.from_json(raw, path)


def _unknown(path: Path, expected: str) -> FedtuneError:
    return FedtuneError(f"{path}: expected {expected}. Was it written by another version?")
