"""Every update is checked before it is folded; a bad one is refused by node and reason."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from flwr.app import Message
from torch import Tensor

from fedtune.adapters import Manifest, check
from fedtune.errors import ManifestError
from fedtune.strategies.base import ClientStats
from fedtune.transport.messages import (
    ARRAYS,
    MOST_STEPS,
    UNKNOWN,
    Declared,
    RoundTask,
    arrays_of,
)
from fedtune.transport.records import config_of, metrics_of, params_of

__all__ = [
    "Expected",
    "Update",
    "UpdateRefusedError",
    "one_line",
    "plausible",
    "read_update",
    "reason_of",
]


MOST_COUNT = 2**53 - 1
LARGEST_FIGURE = 1e30
EXCEPTION = re.compile(r"<class '(?P<type>(?:\w+\.)*(?P<name>\w+))'>:<'(?P<text>.*)'>", re.DOTALL)


class UpdateRefusedError(Exception):
    """The update cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Update:
    """One client's checked reply.

    Attributes:
        extras: name -> what the correction sends beside the parameters.
        squared_norm: |y_k - x|^2 as it is folded.
        extra_norms: name -> norm of it as it is folded.
        clipped_from: the norm that was received, where it was above its bound.
    """

    client: str
    params: dict[str, Tensor]
    stats: ClientStats
    train_loss: float | None
    train_s: float
    extras: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    squared_norm: float = 0.0
    extra_norms: dict[str, float] = field(default_factory=dict)
    clipped_from: float | None = None


@dataclass(frozen=True)
class Expected:
    """What one client's reply has to be.

    Attributes:
        manifest: of what it sends.
        manifest_hash: of the adapter that it trains, of which it may send a part.
        extras: what comes beside the parameters: record names, and what they are called.
        most_steps: optimizer steps that it can have taken.
        declared: what it said before that it can train in a round.
    """

    server_round: int
    manifest: Manifest
    manifest_hash: str
    extras: Mapping[str, str] = field(default_factory=dict)
    most_steps: int = MOST_STEPS
    declared: Declared = UNKNOWN

    @classmethod
    def of(
        cls,
        task: RoundTask,
        manifest: Manifest,
        extras: Mapping[str, str],
        declared: Declared = UNKNOWN,
    ) -> Expected:
        """From what a client was asked: it sends neither what stands still nor what is its own."""
        stays = {*task.frozen, *task.personal}
        sent = {name: entry for name, entry in manifest.entries.items() if name not in stays}
        steps = declared.steps or task.steps or MOST_STEPS
        ours = replace(manifest, entries=sent)
        return cls(task.round, ours, task.manifest, extras, steps, declared)

    def stats(self, metrics: Mapping[str, object]) -> ClientStats:
        """What a client did, no more than it said it could; raises UpdateRefusedError."""
        steps = _count(metrics, "num-steps", self.most_steps)
        of, most = f"{steps} steps of at most", self.declared
        return ClientStats(
            num_examples=_count(
                metrics, "num-examples", steps * most.rows_per_step, f"{of} {most.rows_per_step}"
            ),
            num_tokens=_count(
                metrics, "num-tokens", steps * most.tokens_per_step, f"{of} {most.tokens_per_step}"
            ),
            num_steps=steps,
        )


def read_update(message: Message, expected: Expected) -> Update:
    """Decode and check one reply; raises UpdateRefusedError with the reason."""
    if message.has_error():
        raise UpdateRefusedError(f"client failed: {reason_of(message)}")
    config, metrics = config_of(message.content), metrics_of(message.content)
    if config.get("round") != expected.server_round:
        raise UpdateRefusedError(
            f"stale: expected round {expected.server_round}, received {config.get('round')!r}"
        )
    if config.get("manifest") != expected.manifest_hash:
        raise UpdateRefusedError(
            f"other adapter: expected manifest {expected.manifest_hash[:12]}, "
            f"received {str(config.get('manifest'))[:12]}"
        )
    arrays = message.content.array_records.get(ARRAYS)
    if not arrays:
        raise UpdateRefusedError("empty: expected parameters, received none")
    try:
        params = params_of(arrays, shared=True)
        check(params, expected.manifest)
        extras = {name: _extra(message, expected, name) for name in expected.extras}
    except ManifestError as error:
        raise UpdateRefusedError(one_line(str(error))) from None
    return Update(
        client=str(config.get("client", message.metadata.src_node_id)),
        params=params,
        stats=expected.stats(metrics),
        train_loss=plausible(metrics.get("train-loss")),
        train_s=abs(plausible(metrics.get("train-s")) or 0.0),
        extras={name: tensors for name, tensors in extras.items() if tensors},
    )


def _extra(message: Message, expected: Expected, name: str) -> dict[str, Tensor]:
    """What a correction sends: one tensor for each parameter sent, in fp32 at least."""
    tensors = arrays_of(message.content, name)
    entries = {
        name: entry._replace(dtype=_precise(entry.dtype))
        for name, entry in expected.manifest.entries.items()
    }
    try:
        check(tensors, replace(expected.manifest, entries=entries))
    except ManifestError as error:
        raise ManifestError(f"{expected.extras[name]}: {error}") from None
    return tensors


def _precise(dtype: str) -> str:
    wide = torch.promote_types(getattr(torch, dtype), torch.float32)
    return str(wide).removeprefix("torch.")


def plausible(value: object) -> float | None:
    """A figure for the record, small enough to be summed; None when it is no such number."""
    number = finite_or_none(value)
    return None if number is None or abs(number) > LARGEST_FIGURE else number


def finite_or_none(value: object) -> float | None:
    """The number, or None when it is missing, NaN, infinite or beyond fp64."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def one_line(text: str | None, limit: int = 300) -> str:
    """Text folded into one line of at most `limit` characters."""
    folded = " ".join((text or "no reason given").split())
    return folded if len(folded) <= limit else folded[: limit - 1] + "…"


def reason_of(message: Message) -> str:
    """Why a client failed, in one line; Flower hands on exceptions as `<class 'x.E'>:<'why'>`."""
    text = (message.error.reason if message.has_error() else "") or ""
    match = EXCEPTION.fullmatch(text)
    if match is None:
        return one_line(text)
    known = match["type"].startswith("fedtune.") and match["text"]
    return one_line(match["text"] if known else f"{match['name']}: {match['text']}".rstrip(": "))


def _count(metrics: Mapping[str, object], name: str, most: int, declared: str = "") -> int:
    """A count in a reply; `most` is 0 where nothing was declared."""
    value = metrics.get(name)
    bounded = 0 < most < MOST_COUNT
    if not isinstance(value, int) or not 0 < value <= (most if bounded else MOST_COUNT):
        why = f" (declared before: {declared})" if declared and bounded else ""
        expected = f"expected 1 to {most if bounded else MOST_COUNT}{why}"
        raise UpdateRefusedError(f"{name}: {expected}, received {value!r}")
    return value
