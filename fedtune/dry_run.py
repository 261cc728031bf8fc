"""`--dry_run`: what a run would do, in numbers; nothing is trained and nothing written."""

from __future__ import annotations

from fedtune.client.worker import Worker
from fedtune.config import Arguments, sampled_clients
from fedtune.data import format_table
from fedtune.prepare import Prepared, steps_per_client
from fedtune.strategies import strategy_of

__all__ = ["describe_run"]


def describe_run(args: Arguments, prepared: Prepared) -> str:
    """Rows, steps, bytes and memory of a run."""
    worker, federation = prepared.worker, args.federation
    params, static = worker.initial()
    steps = steps_per_client(args, worker)
    sampled = sampled_clients(federation.fraction_train, len(steps))
    sent = {name: worker.manifest_of(name).bytes for name in worker.train}
    once = sum(value.numel() * value.element_size() for value in static.values())
    values = sum(value.numel() for value in params.values())
    round_mb = 2 * sampled * sum(sent.values()) / len(sent) / 1e6
    fewest, most = min(steps), max(steps)
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    sizes = sorted({f"{size / 1e6:.3f}" for size in sent.values()}, key=float)
    terms = strategy_of(federation).properties.changes_base
    lines = {
        "held out": f"{len(worker.evaluation):,} rows",
        **({"ranks": _ranks(worker, sent)} if args.adapter.ranks else {}),
        "travels": f"{len(params)} tensors, {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} MB"
        + (f"; once {once / 1e6:.3f} MB" if once else "")
        + ("; down also what the method has added to the base" if terms else ""),
        "per round": f"{sampled} of {len(steps)} clients, {each} steps each, "
        f"{round_mb:.3f} MB in both directions",
        "whole run": f"{federation.num_rounds} rounds, {len(args.seeds)} seed(s), "
        f"{federation.num_rounds * sum(steps) * sampled // len(steps):,} steps and "
        f"{federation.num_rounds * round_mb:.2f} MB a seed",
        "memory": f"base model {prepared.model_bytes / 1e6:.1f} MB a process, one client's Adam "
        f"{8 * values / 1e6:.2f} MB, server sum {16 * values / 1e6:.2f} MB; activations extra",
    }
    table = [format_table(prepared.clients)]
    return "\n".join(table + [f"{name:<10} {text}" for name, text in lines.items()])


def _ranks(worker: Worker, sent: dict[str, int]) -> str:
    """Each client's rank, and the bytes that it receives and sends in a round."""
    return ", ".join(
        f"{client} {worker.ranks[client]} ({size / 1e6:.3f} MB)" for client, size in sent.items()
    )
