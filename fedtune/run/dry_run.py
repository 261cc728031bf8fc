"""`--dry_run`: what a run would do, in numbers; nothing is trained and nothing written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedtune.adapters import Manifest
from fedtune.client.worker import Worker
from fedtune.config import Arguments, sampled_clients
from fedtune.data import format_table
from fedtune.data.usage import Usage
from fedtune.run.prepare import Prepared, steps_per_client
from fedtune.strategies import Method, strategy_of
from fedtune.transport.codec_grid import MOST_BYTES
from fedtune.transport.settings import CodecSettings

__all__ = ["describe_run"]

# Bytes a value with its share of scales; headers, some 20 bytes a tensor, are left out.
BYTES = {"bf16": 2.0, "fp16": 2.0, "int8": 1.016, "nf4": 0.516, "fp4": 0.516}


def describe_run(args: Arguments, prepared: Prepared) -> str:
    """Rows, steps, bytes and memory of a run."""
    worker, federation = prepared.worker, args.federation
    params, static = worker.initial()
    steps = steps_per_client(args, worker)
    sampled = sampled_clients(federation.fraction_train, len(steps))
    sent = {name: worker.manifest_of(name).bytes for name in worker.train}
    once = sum(value.numel() * value.element_size() for value in static.values())
    values = sum(value.numel() for value in params.values())
    method = strategy_of(federation)
    properties = method.properties
    codec = CodecSettings.of(args.transport, refactors=properties.refactors)
    manifests = [worker.manifest_of(name) for name in worker.train]
    traffic = _traffic(codec, manifests, sampled, method)
    coded = codec.codec != "none"
    least = "at least " if properties.changes_base else ""
    about = least or ("about " if coded else "")
    of_raw = f" ({100 * traffic.round / traffic.raw:.0f} % of raw)" if coded else ""
    size = sum(sent.values()) / len(sent) * (1 + len(method.extras))
    kept = _kept(codec, size, 1 if sampled == len(steps) else len(steps))
    fewest, most = min(steps), max(steps)
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    sizes = sorted({f"{size / 1e6:.3f}" for size in sent.values()}, key=float)
    lines = {
        "held out": _held_out(prepared.held_out),
        **({"ranks": _ranks(worker, sent)} if args.adapter.ranks else {}),
        "travels": f"{len(params)} tensors, {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} MB"
        + (f"; once {once / 1e6:.3f} MB" if once else "")
        + ("; as much again for control variates" if method.extras else "")
        + ("; down also what the method has added to the base" if properties.changes_base else ""),
        **({"codec": _codec(codec, worker.manifest)} if coded else {}),
        "per round": f"{sampled} of {len(steps)} clients, {each} steps each, "
        f"{about}{traffic.round:.3f} MB in both directions{of_raw}",
        "whole run": f"{federation.num_rounds} rounds, {len(args.seeds)} seed(s), "
        f"{federation.num_rounds * sum(steps) * sampled // len(steps):,} steps and "
        f"{about}{federation.num_rounds * traffic.round:.2f} MB a seed",
        "memory": f"base model {prepared.model_bytes / 1e6:.1f} MB a process, one client's Adam "
        f"{8 * values / 1e6:.2f} MB, server sum {16 * values / 1e6:.2f} MB"
        + (f" and what clients have {least}{kept / 1e6:.2f} MB" if kept else "")
        + "; activations extra",
    }
    table = [format_table(prepared.clients)]
    told = [f"{name:<10} {text}" for name, text in lines.items()]
    return "\n".join([*table, *told, *(f"{'note':<10} {note}" for note in prepared.notes)])


def _held_out(usage: Usage) -> str:
    left = "" if usage.rows_used in (None, usage.rows) else f", {usage.rows_used:,} used"
    return f"{usage.rows:,} rows{left}"


class Estimate(NamedTuple):
    """Estimates in MB of a round, of all clients and both directions."""

    round: float
    raw: float  # the same without a codec


def _traffic(
    codec: CodecSettings, manifests: Sequence[Manifest], sampled: int, method: Method
) -> Estimate:
    def mean_mb(kind: str) -> float:
        return sum(_coded(manifest, codec, kind) for manifest in manifests) / len(manifests) / 1e6

    # New factors are no small difference to the old ones: 16 bits travel.
    whole = method.properties.refactors and codec.on == "delta" and codec.down != "none"
    down = "bf16" if whole else codec.down
    count = sampled * (1 + len(method.extras))
    return Estimate(count * (mean_mb(codec.up) + mean_mb(down)), 2 * count * mean_mb("none"))


def _kept(codec: CodecSettings, size: float, histories: int) -> float:
    """Most bytes at the server of what clients have and were meant to have."""
    return 0 if codec.down == "none" else min(2 * size * histories, max(MOST_BYTES, 2 * size))


def _coded(manifest: Manifest, codec: CodecSettings, kind: str) -> float:
    """About how many bytes the tensors of an adapter are under the codec `kind`."""
    rate = BYTES.get(kind, math.inf)
    return sum(
        min(entry.bytes, rate * math.prod(entry.shape))
        if codec.takes(name, entry.shape)
        else entry.bytes
        for name, entry in manifest.entries.items()
    )


def _codec(codec: CodecSettings, manifest: Manifest) -> str:
    taken = sum(codec.takes(name, entry.shape) for name, entry in manifest.entries.items())
    ways = "up and down" if codec.direction == "both" else codec.direction
    return (
        f"{codec.codec} on {codec.on}, {ways}, {taken} of {len(manifest.entries)} tensors; error "
        f"feedback {'on' if codec.feedback else 'off'}"
    )


def _ranks(worker: Worker, sent: dict[str, int]) -> str:
    """Each client's rank, and the bytes that it receives and sends in a round."""
    return ", ".join(
        f"{client} {worker.ranks[client]} ({size / 1e6:.3f} MB)" for client, size in sent.items()
    )
