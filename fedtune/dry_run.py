"""`--dry_run`: what a run would do, in numbers; nothing is trained and nothing written."""

from __future__ import annotations

from fedtune.config import Arguments, sampled_clients
from fedtune.data import format_table
from fedtune.prepare import Prepared, steps_per_client

__all__ = ["describe_run"]


def describe_run(args: Arguments, prepared: Prepared) -> str:
    """Rows, steps, bytes and memory of a run."""
    worker, federation = prepared.worker, args.federation
    params, static = worker.initial()
    steps = steps_per_client(args, worker)
    sampled = sampled_clients(federation.fraction_train, len(steps))
    travels = sum(value.numel() * value.element_size() for value in params.values())
    once = sum(value.numel() * value.element_size() for value in static.values())
    values = sum(value.numel() for value in params.values())
    round_mb = 2 * sampled * travels / 1e6
    fewest, most = min(steps), max(steps)
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    lines = {
        "held out": f"{len(worker.evaluation):,} rows",
        "travels": f"{len(params)} tensors, {travels / 1e6:.3f} MB"
        + (f"; once {once / 1e6:.3f} MB" if once else ""),
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
