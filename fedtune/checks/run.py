"""Rules about the run itself: rounds, clients, arms, engine, output."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from fedtune.config import ARMS, TRACKERS, Arguments, sampled_clients
from fedtune.extensions import WORKFLOWS
from fedtune.lists import split_names
from fedtune.nearest import nearest

__all__ = [
    "compare",
    "delays",
    "engine",
    "min_replies",
    "one_budget",
    "order",
    "output",
    "seeds",
    "track",
    "workflow",
]


def one_budget(args: Arguments) -> str | None:
    """A round is counted in steps or in passes."""
    fed = args.federation
    if fed.steps_per_round is not None and fed.epochs_per_round is not None:
        return "--steps_per_round and --epochs_per_round are both set. Keep one of them."
    return None


def workflow(args: Arguments) -> str | None:
    """Whether there is such a workflow."""
    name = args.federation.workflow
    if name in WORKFLOWS:
        return None
    return f"--workflow: unknown workflow {name!r}. {nearest(name, WORKFLOWS)}"


def min_replies(args: Arguments) -> str | None:
    """Whether so many replies can come."""
    fed = args.federation
    if fed.min_replies is None:
        return None
    expected = "expected a whole number >= 1 or a fraction > 0 and <= 1 written with a point"
    try:
        # `1` is one update, `1.0` all of them: the point decides.
        value = float(fed.min_replies) if "." in fed.min_replies else int(fed.min_replies)
    except ValueError:
        value = 0
    sampled = sampled_clients(fed.fraction_train, fed.num_clients)
    most = 1 if isinstance(value, float) else sampled
    if isinstance(value, int) and value > most:
        return (
            f"--min_replies: expected at most {sampled}, the clients asked in a round "
            f"(--num_clients {fed.num_clients}, --fraction_train {fed.fraction_train}); "
            f"received {value}."
        )
    if not 0 < value <= most:
        return f"--min_replies: {expected}; received {fed.min_replies!r}."
    return None


def seeds(args: Arguments) -> str | None:
    """A seed twice would be the same run twice."""
    twice = [seed for seed in args.seeds if args.seeds.count(seed) > 1]
    return f"--seeds: {twice[0]} is given twice. Every seed is one run." if twice else None


def compare(args: Arguments) -> str | None:
    """Known arms, and parity only where it can hold."""
    named = split_names(args.run.compare)
    for arm in named:
        if arm not in (*ARMS, "all", "none"):
            return f"--compare: unknown arm {arm!r}. {nearest(arm, (*ARMS, 'all', 'none'))}"
    alone = next((name for name in ("all", "none") if name in named), None)
    if alone and len(named) > 1:
        return f"--compare: `{alone}` stands alone. Leave out the other names."
    if "parity" in args.arms and args.federation.client_state == "reset":
        return (
            "--compare parity with --client_state reset: a fresh optimizer each round cannot equal "
            "one plain training. Use --client_state carry, or name the other arms."
        )
    return None


def track(args: Arguments) -> str | None:
    """Known trackers that are installed."""
    for name in split_names(args.run.track):
        if name not in TRACKERS:
            return f"--track: unknown tracker {name!r}. {nearest(name, TRACKERS)}"
        if not _installed(name):
            return f"--track {name}: not installed. Run: pip install 'fedtune[tracking]'"
    return None


def delays(args: Arguments) -> str | None:
    """One delay per client, where clients are simulated one after the other."""
    fed = args.federation
    delays = fed.delays
    if delays is None:
        return None
    if fed.engine != "inline":
        return (
            f"--client_delays: clients of --engine {fed.engine} take the time they take. "
            "Leave it out."
        )
    if len(delays) != fed.num_clients or not all(0 <= delay < math.inf for delay in delays):
        return (
            f"--client_delays: expected {fed.num_clients} numbers >= 0, one per client, received "
            f"{fed.client_delays}."
        )
    return None


def order(args: Arguments) -> str | None:
    """Rounds that begin anew begin with other rows."""
    strategy = getattr(args.training, "train_sampling_strategy", "random")
    if args.federation.client_state == "reset" and strategy == "sequential":
        return (
            "--train_sampling_strategy sequential with --client_state reset: every round would "
            "begin with the same rows. Use --client_state carry."
        )
    return None


def engine(args: Arguments) -> str | None:
    """What the engine needs, and what it cannot have."""
    fed, run, training = args.federation, args.run, args.training
    if fed.engine == "ray" and not _installed("ray"):
        return "--engine ray: not installed. Run: pip install 'fedtune[ray]'"
    if fed.engine != "inline" and run.resume:
        return (
            "--resume works with --engine inline only: clients of --engine "
            f"{fed.engine} keep their state in processes that are gone."
        )
    if fed.engine == "flower" and fed.client_state == "reset":
        return "--client_state reset: a live trainer carries its state. Use --engine inline or ray."
    if fed.engine != "ray" and (fed.gpus_per_client > 0 or fed.cpus_per_client != 1):
        flag = "gpus" if fed.gpus_per_client > 0 else "cpus"
        return f"--{flag}_per_client has no effect with --engine {fed.engine}. Use --engine ray."
    for flag in ("deepspeed", "fsdp"):
        if getattr(training, flag, None):
            return f"--{flag}: clients of --engine {fed.engine} hold whole tensors. Leave it out."
    return None


def output(args: Arguments) -> str | None:
    """Nothing that is needed lies in a directory that is deleted."""
    if args.run.resume and args.run.overwrite:
        return (
            "--resume and --overwrite are both set: one keeps the earlier run, one deletes it. "
            "Keep one of them."
        )
    start, output = args.adapter.init_adapter, Path(args.training.output_dir).resolve()
    if start and args.run.overwrite and Path(start).resolve().is_relative_to(output):
        return (
            f"--init_adapter {start} lies in the run that --overwrite deletes. Write to another "
            "--output_dir."
        )
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
