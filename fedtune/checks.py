"""Which settings go together: ranges of single settings (`ranges.py`), then `RULES` over several.

A rule is a small function that returns what is wrong, ending with the fix, or None. The first
problem is raised.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from fedtune.config import (
    ARMS,
    TRACKERS,
    Arguments,
    sampled_clients,
    split_names,
)
from fedtune.errors import ConfigError
from fedtune.nearest import nearest
from fedtune.ranges import Range, federation_ranges, ranges

__all__ = ["check_arguments", "check_federation"]

LORA = ("lora", "dora")
PROMPTS = ("p_tuning", "prompt_tuning", "prefix_tuning")

Rule = Callable[[Arguments], str | None]


def check_arguments(args: Arguments) -> None:
    """Raise `ConfigError`, one line, for the first setting that cannot work."""
    _check(args, ranges(args), RULES)


def check_federation(args: Arguments) -> None:
    """`check_arguments` of the federation alone: a deployment, whose sites bring all the rest."""
    _check(args, federation_ranges(args.federation), (_one_budget, _track, _strategy, _output))


def _check(args: Arguments, rows: Iterable[Range], rules: Iterable[Rule]) -> None:
    for flag, value, holds, expected in rows:
        if value is not None and not holds:
            raise ConfigError(f"--{flag}: expected {expected}, received {value}.")
    for rule in rules:
        problem = rule(args)
        if problem:
            raise ConfigError(problem)


def _one_budget(args: Arguments) -> str | None:
    fed = args.federation
    if fed.steps_per_round is not None and fed.epochs_per_round is not None:
        return "--steps_per_round and --epochs_per_round are both set. Keep one of them."
    return None


def _min_replies(args: Arguments) -> str | None:
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


def _seeds(args: Arguments) -> str | None:
    twice = [seed for seed in args.seeds if args.seeds.count(seed) > 1]
    return f"--seeds: {twice[0]} is given twice. Every seed is one run." if twice else None


def _quantized(args: Arguments) -> str | None:
    model, method = args.model, args.adapter.peft_method
    if model.load_in_4bit and model.load_in_8bit:
        return "--load_in_4bit and --load_in_8bit are both set. Keep one of them."
    if (model.load_in_4bit or model.load_in_8bit) and method == "none":
        flag = "--load_in_4bit" if model.load_in_4bit else "--load_in_8bit"
        return f"{flag} with --peft_method none: quantized weights cannot be trained. Use lora."
    return None


def _adapter(args: Arguments) -> str | None:
    adapter, method = args.adapter, args.adapter.peft_method
    if adapter.use_rslora and method not in LORA:
        return f"--use_rslora needs --peft_method lora or dora, received {method}. Leave it out."
    if adapter.modules_to_save and method in (*PROMPTS, "none"):
        return f"--modules_to_save does not go with --peft_method {method}. Leave it out."
    if adapter.prefix_projection and method != "prefix_tuning":
        return f"--prefix_projection needs --peft_method prefix_tuning, received {method}."
    if adapter.encoder_reparameterization_type != "MLP" and method != "p_tuning":
        return f"--encoder_reparameterization_type needs --peft_method p_tuning, received {method}."
    encoder = method == "p_tuning" or adapter.prefix_projection
    if adapter.encoder_hidden_size != 128 and not encoder:
        return (
            "--encoder_hidden_size needs --peft_method p_tuning, or prefix_tuning with "
            f"--prefix_projection; received {method}."
        )
    return None


def _data(args: Arguments) -> str | None:
    data = args.data
    if data.dataset_name and data.train_file:
        return "--dataset_name and --train_file are both set. Keep one of them."
    if data.partition == "column" and not data.partition_column:
        return "--partition column needs --partition_column NAME, the column that owns a row."
    if data.partition_column and data.partition in ("iid", "size"):
        return (
            f"--partition_column has no effect with --partition {data.partition}. "
            "Use --partition column or dirichlet."
        )
    for flag, file in (("train_file", data.train_file), ("eval_file", data.eval_file)):
        if file and not Path(file).is_file():
            return f"--{flag}: no file {file}. Paths start at the working directory."
    start = args.adapter.init_adapter
    if start and not Path(start).is_dir():
        return f"--init_adapter: no directory {start}. Give the adapter/ of a run."
    return None


def _compare(args: Arguments) -> str | None:
    named = split_names(args.run.compare)
    for arm in named:
        if arm not in (*ARMS, "all"):
            return f"--compare: unknown arm {arm!r}. {nearest(arm, (*ARMS, 'all'))}"
    if "all" in named and len(named) > 1:
        return "--compare: `all` stands alone. Leave out the other names."
    if "parity" in args.arms and args.federation.client_state == "reset":
        return (
            "--compare parity with --client_state reset: a fresh optimizer each round cannot equal "
            "one plain training. Use --client_state carry, or name the other arms."
        )
    return None


def _track(args: Arguments) -> str | None:
    for name in split_names(args.run.track):
        if name not in TRACKERS:
            return f"--track: unknown tracker {name!r}. {nearest(name, TRACKERS)}"
        if not _installed(name):
            return f"--track {name}: not installed. Run: pip install 'fedtune[tracking]'"
    return None


def _strategy(args: Arguments) -> str | None:
    from fedtune.strategies import strategy_of  # torch

    fed = args.federation
    try:
        method = strategy_of(fed)
    except ConfigError as error:
        return str(error)
    if method.has_control and getattr(args.training, "fp16", False):
        return (
            f"--strategy {fed.strategy} with --fp16: the loss scaler leaves out steps that control "
            "variates count on. Use --bf16."
        )
    sampled, least = sampled_clients(fed.fraction_train, fed.num_clients), method.least_updates()
    if sampled < least:
        return (
            f"--strategy {fed.strategy}: expected at least {least} clients asked in a round, "
            f"received {sampled}. Raise --num_clients or --fraction_train, or change what asks for "
            "so many in --strategy_args (f, m, beta)."
        )
    if method.buffer(sampled) and fed.min_replies is not None:
        return (
            f"--min_replies with --strategy {fed.strategy}: the buffer says how many updates end a "
            "round. Leave it out, and set size in --strategy_args."
        )
    return None


def _lora_rule(args: Arguments) -> str | None:
    """Whether the rule is right for this adapter, and for these ranks."""
    from fedtune.strategies import for_mixed_ranks, strategy_of  # torch

    adapter, fed = args.adapter, args.federation
    properties = strategy_of(fed).properties
    kind = adapter.peft_method if adapter.peft_method in LORA else "other"
    if properties.variants is not None and kind not in properties.variants:
        kinds = " or ".join(sorted(properties.variants & set(LORA)))
        return (
            f"--strategy {fed.strategy}: expected --peft_method {kinds}, received "
            f"{adapter.peft_method}. Use that, or fedavg."
        )
    if adapter.client_ranks is None:
        return None
    ranks = adapter.ranks or []
    if kind == "other":
        return f"--client_ranks needs --peft_method lora, received {adapter.peft_method}."
    if len(ranks) != fed.num_clients or min(ranks) < 1:
        return (
            f"--client_ranks: expected {fed.num_clients} whole numbers >= 1, one per client, "
            f"received {adapter.client_ranks}."
        )
    if len(set(ranks)) > 1 and not properties.mixed_ranks:
        return (
            f"--client_ranks with --strategy {fed.strategy}: it needs equal ranks. Use "
            f"{for_mixed_ranks()}."
        )
    return None


def _delays(args: Arguments) -> str | None:
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


def _engine(args: Arguments) -> str | None:
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


def _output(args: Arguments) -> str | None:
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


RULES: tuple[Rule, ...] = (
    _one_budget,
    _min_replies,
    _seeds,
    _quantized,
    _adapter,
    _data,
    _compare,
    _track,
    _strategy,
    _lora_rule,
    _delays,
    _engine,
    _output,
)
