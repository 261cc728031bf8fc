"""One round as a line of `rounds.jsonl` holds it: scores, bytes, replies, refusals, times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from fedtune.errors import FedtuneError
from fedtune.results.values import count, items, listed, mapping, number

__all__ = [
    "ROUNDS",
    "FailedAttempt",
    "Refusal",
    "RoundRecord",
    "WireBytes",
    "load_rounds",
    "read_lines",
    "read_rounds",
    "rounds_file",
]

ROUNDS = "rounds.jsonl"

# Keys that a line lacks where there is nothing to say, and those that round 0 lacks: it trains
# nothing.
IF_KNOWN = {"eval_clients", "server_rate", "base_rank", "base_error"}
AFTER_TRAINING = {
    "attempt",
    "clients",
    "replies",
    "refused",
    "failed_attempts",
    "update_norm",
    "client_drift",
    "residual",
    "residual_fedavg",
}


@dataclass(frozen=True)
class Refusal:
    """Whose update was refused, and why."""

    node: int | None
    client: str
    reason: str

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """The refusal in a JSON object."""
        plain = mapping(raw)
        names = [str(plain.get(key) or "") for key in ("client", "reason")]
        return cls(plain.get("node"), *names)

    @property
    def who(self) -> str:
        """`clinic-a, node 17`."""
        if self.node is None:
            return self.client
        return f"{self.client}, node {self.node}" if self.client else str(self.node)


@dataclass(frozen=True)
class FailedAttempt:
    """An attempt at a round that came to nothing."""

    reason: str
    refused: tuple[Refusal, ...] = ()

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """The attempt in a JSON object."""
        plain = mapping(raw)
        refused = tuple(map(Refusal.from_json, items(plain.get("refused"))))
        return cls(str(plain.get("reason") or ""), refused)


@dataclass(frozen=True)
class WireBytes:
    """Bytes on the wire, and of the same records without a codec; None where nobody counted."""

    up: float | None = None
    down: float | None = None
    up_raw: float | None = None
    down_raw: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """`{"bytes_up": ..., "bytes_down": ..., "bytes_up_raw": ..., "bytes_down_raw": ...}`."""
        return {f"bytes_{item.name}": getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """The bytes in a JSON object, which may hold more than them."""
        plain = mapping(raw)
        return cls(*(number(plain.get(f"bytes_{item.name}")) for item in fields(cls)))

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
class RoundRecord:
    """One round; its fields are the keys of its line, in their order.

    Attributes:
        round: its number; 0 is the evaluation before any training.
        eval_metrics: task metrics of the held-out rows, by name.
        eval_clients: scores by client, where more than one has scored.
        samples: seen by all clients together since the run began; `tokens` likewise.
        traffic: bytes of all clients in this round, under keys of their own.
        clients: bytes by client.
        replies: what each accepted update's client has told of it.
        refused: updates that the attempt which was good has left out.
        residual: distance of a LoRA rule's update from the exact mean of the products.
        base_rank: of what a rule has added to the base; `base_error`: what its recompression lost.
        time: seconds by activity: train, wait, codec, aggregate, evaluate.
    """

    round: int | None
    attempt: int | None = None
    eval_loss: float | None = None
    eval_metrics: Mapping[str, float | None] = field(default_factory=dict)
    eval_clients: Sequence[Any] | None = None
    train_loss: float | None = None
    samples: float | None = None
    tokens: float | None = None
    traffic: WireBytes = WireBytes()
    clients: Mapping[str, WireBytes] = field(default_factory=dict)
    wall_s: float | None = None
    replies: Sequence[Mapping[str, Any]] = ()
    refused: Sequence[Refusal] = ()
    failed_attempts: Sequence[FailedAttempt] = ()
    update_norm: float | None = None
    client_drift: float | None = None
    server_rate: float | None = None
    residual: float | None = None
    residual_fedavg: float | None = None
    base_rank: int | None = None
    base_error: float | None = None
    time: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        plain: dict[str, Any] = {}
        for name, value in listed(asdict(self)).items():
            if name == "traffic":
                plain |= self.traffic.to_json()
            elif name == "clients" and self.round != 0:
                plain[name] = {client: sent.to_json() for client, sent in self.clients.items()}
            elif (name not in IF_KNOWN or value is not None) and (
                name not in AFTER_TRAINING or self.round != 0
            ):
                plain[name] = value
        return plain

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """The record in a JSON object; fields that a damaged line lacks are empty."""
        plain = mapping(raw)
        scores, clients = plain.get("eval_clients"), mapping(plain.get("clients"))
        return cls(
            round=count(plain.get("round")),
            attempt=count(plain.get("attempt")),
            eval_metrics=_numbers(plain.get("eval_metrics")),
            eval_clients=scores if isinstance(scores, list) else None,
            traffic=WireBytes.from_json(plain),
            clients={name: WireBytes.from_json(one) for name, one in clients.items()},
            replies=tuple(map(mapping, items(plain.get("replies")))),
            refused=tuple(map(Refusal.from_json, items(plain.get("refused")))),
            failed_attempts=tuple(
                map(FailedAttempt.from_json, items(plain.get("failed_attempts")))
            ),
            base_rank=count(plain.get("base_rank")),
            time={
                name: seconds
                for name, seconds in _numbers(plain.get("time")).items()
                if seconds is not None
            },
            **{
                item.name: number(plain.get(item.name))
                for item in fields(cls)
                if item.type == "float | None"
            },
        )

    @property
    def refusals(self) -> list[tuple[int, Refusal]]:
        """Updates that were left out, with the attempt at this round that did it."""
        last = self.attempt or len(self.failed_attempts) + 1
        tries = [*enumerate((one.refused for one in self.failed_attempts), 1), (last, self.refused)]
        return [(attempt, refusal) for attempt, refused in tries for refusal in refused]


def rounds_file(directory: Path) -> Path | None:
    """The `rounds.jsonl` of a run; over several seeds, the first one's. None when none exists."""
    seeds = sorted(directory.glob(f"seeds/*/{ROUNDS}"), key=lambda path: _seed(path.parent.name))
    return next((path for path in (directory / ROUNDS, *seeds) if path.is_file()), None)


def load_rounds(directory: str | Path) -> list[RoundRecord]:
    """The rounds in `rounds_file`, none without one."""
    path = rounds_file(Path(directory))
    return [] if path is None else read_rounds(path)


def read_rounds(path: Path) -> list[RoundRecord]:
    """The rounds in `rounds.jsonl`; FedtuneError as `read_lines`."""
    return list(map(RoundRecord.from_json, read_lines(path)))


def read_lines(path: Path) -> list[Any]:
    """The JSON values of a file's lines, none where there is no such file.

    A last line that is no JSON is left out: it is being written, or its writer was killed.

    Raises:
        FedtuneError: another line is no JSON.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    values = []
    for index, line in enumerate(lines):
        try:
            values.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            if index == len(lines) - 1:
                break
            raise FedtuneError(
                f"{path}: expected JSON on line {index + 1}, received {error}. Was it written by "
                "another version?"
            ) from None
    return values


def _seed(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (1 << 62, name)


def _numbers(raw: object) -> dict[str, float | None]:
    return {name: number(value) for name, value in mapping(raw).items()}
