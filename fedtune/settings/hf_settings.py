"""HuggingFace settings that fedtune owns, and those with another default here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple

__all__ = ["DEFAULTS", "OWNED", "defaults_for", "refused_value"]

_ROUNDS = "use --num_rounds with --steps_per_round or --epochs_per_round"
_SCORED = "the global model is scored before training and after every round; use --steps_per_round"
_SAVED = "use --save_every_rounds"
_BEST = "best/ always holds the round with the lowest global eval loss; leave it out"
_HUB = "run `fedtune export` and upload the directory it writes"

# Settings of TrainingArguments that the federation decides -> what to do instead.
OWNED: dict[str, str] = {
    "max_steps": _ROUNDS,
    "num_train_epochs": _ROUNDS,
    "eval_strategy": _SCORED,
    "eval_steps": _SCORED,
    "eval_delay": _SCORED,
    "eval_on_start": _SCORED,
    "do_train": "a run always trains; use --dry_run to only look",
    "do_eval": _SCORED,
    "do_predict": "use the adapter/ that the run writes",
    "save_strategy": _SAVED,
    "save_steps": _SAVED,
    "save_total_limit": _SAVED,
    "save_only_model": _SAVED,
    "enable_jit_checkpoint": _SAVED,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "resume_from_checkpoint": "use --resume",
    "ignore_data_skip": "use --client_state carry (data continue) or reset",
    "auto_find_batch_size": "use --per_device_train_batch_size",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}


_OWN_WEIGHTS = "it keeps weights of its own, which no round would send. Use adamw_torch"
_INSIDE = (
    "it steps inside of the backward pass, where a round can neither correct nor keep it. Use "
    "adamw_torch, or an 8-bit one"
)
_METRIC = (
    "it follows the Trainer's own evaluation, and here the global model is scored. Use linear, "
    "cosine or constant"
)

# Values of settings by pattern, and why they cannot be taken.
_REFUSED = {
    "optim": {
        "schedule_free_*": _OWN_WEIGHTS,
        "lomo": _INSIDE,
        "adalomo": _INSIDE,
        "*_layerwise": _INSIDE,
    },
    "lr_scheduler_type": {"reduce_lr_on_plateau": _METRIC, "greedy": _METRIC},
}


def refused_value(given: Mapping[str, Any], names: Collection[str] = tuple(_REFUSED)) -> str | None:
    """Why a value of one of the settings `names` cannot be taken, or None."""
    for name in names:
        value = str(getattr(given.get(name), "value", given.get(name)))
        for pattern, why in _REFUSED[name].items():
            if fnmatch(value, pattern):
                return f"--{name} {value}: {why}."
    return None


class Default(NamedTuple):
    """A default of fedtune for a HuggingFace setting that the user did not set."""

    name: str
    value: Any
    why: str
    unless: tuple[str, ...] = ()  # not applied when the user set one of these
    only_cpu: bool = False


DEFAULTS: tuple[Default, ...] = (
    Default("data_seed", 42, "the held-out split must not change with --seed"),
    Default("report_to", "none", "one tracker run per client is noise; --track logs the rounds"),
    Default("save_strategy", "no", "the federation writes its own state at round ends"),
    Default("eval_strategy", "no", "the federation scores the global model"),
    Default("max_length", None, "trl cuts at 1024 silently; here what the model can read is read"),
    Default("assistant_only_loss", None, "on for conversations whose chat template marks turns"),
    Default("disable_tqdm", True, "one bar per client and round hides the table of rounds"),
    Default(
        "activation_checkpointing",
        False,
        "trl switches it on; slower, and adapters rarely need it",
        unless=("gradient_checkpointing",),
    ),
    Default(
        "gradient_checkpointing",
        False,
        "the same under its older name",
        unless=("activation_checkpointing",),
    ),
    Default("use_cpu", True, "no accelerator here", only_cpu=True),
    Default("bf16", False, "trl switches it on; slow on a CPU", unless=("fp16",), only_cpu=True),
)


def defaults_for(
    fields: Collection[str], given: Mapping[str, Any], *, has_accelerator: Callable[[], bool]
) -> dict[str, Any]:
    """The rows of `DEFAULTS` that apply to a class with `fields` when the user set `given`."""
    on_cpu = given["use_cpu"] if "use_cpu" in given else not has_accelerator()
    return {
        row.name: row.value
        for row in DEFAULTS
        if row.name in fields
        and row.name not in given
        and not any(other in given for other in row.unless)
        and (on_cpu or not row.only_cpu)
    }
