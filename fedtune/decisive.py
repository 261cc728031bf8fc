"""Which settings decide a result: those that a continued run shares with its beginning."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fedtune.config import Arguments

__all__ = ["decides", "run_settings"]

# Where and how a run is carried out, watched and kept, in the groups of fedtune.
_FREE = frozenset(
    [
        "cpus_per_client",
        "engine",
        "gpus_per_client",
        "max_failed_rounds",
        "min_replies",
        "round_timeout_s",
        "save_every_rounds",
    ]
)

# The same of HuggingFace's; whatever is not listed decides, that of a later version too.
_FREE_TRAINING = frozenset(
    [
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "ddp_timeout",
        "debug",
        "disable_tqdm",
        "do_eval",
        "do_predict",
        "do_train",
        "enable_jit_checkpoint",
        "eval_accumulation_steps",
        "eval_delay",
        "eval_do_concat_batches",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "eval_use_gather_object",
        "greater_is_better",
        "include_num_input_tokens_seen",
        "load_best_model_at_end",
        "local_rank",
        "max_steps",  # rounds and their budgets are compared themselves
        "metric_for_best_model",
        "num_train_epochs",
        "output_dir",
        "per_device_eval_batch_size",
        "project",
        "push_to_hub",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        "run_name",
        "seed",  # all of them are compared
        "skip_memory_metrics",
        "torch_empty_cache_steps",
        "use_cpu",
    ]
)
_FREE_PREFIXES = ("hub_", "log_", "logging_", "save_", "trackio_")


def decides(name: str, *, training: bool = False) -> bool:
    """Whether a setting changes the result; `training`: it is one of HuggingFace's."""
    if training:
        return name not in _FREE_TRAINING and not name.startswith(_FREE_PREFIXES)
    return name not in _FREE


def run_settings(args: Arguments) -> dict[str, Any]:
    """Settings by flag name that a run and its continuation must share, as JSON values."""
    groups = (args.model, args.adapter, args.data, args.federation, args.transport)
    settings = {
        name: value for group in groups for name, value in vars(group).items() if decides(name)
    }
    for field in dataclasses.fields(args.training):
        if field.init and decides(field.name, training=True):
            settings[field.name] = getattr(args.training, field.name, None)
    plain: dict[str, Any] = json.loads(json.dumps({**settings, "seeds": args.seeds}, default=str))
    return plain
