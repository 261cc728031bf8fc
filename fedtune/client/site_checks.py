"""Whether a script's Trainer can be trained in rounds, and what its owner should know."""

from __future__ import annotations

import logging

from transformers import Trainer

from fedtune.client.client_round import refuse_own_weights
from fedtune.client.local import model_of
from fedtune.client.options import Options
from fedtune.errors import ConfigError
from fedtune.settings.hf_settings import refused_value

__all__ = ["check_trainer"]

log = logging.getLogger(__name__)


def check_trainer(trainer: Trainer, options: Options) -> None:
    """Raise ConfigError for what cannot be trained in rounds; warn of what a restart loses."""
    problem = _problem(trainer, options)
    if problem:
        raise ConfigError(f"patch: {problem}")
    refuse_own_weights(trainer.optimizer)
    args = trainer.args
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    for name, lost in (
        ("save_only_model", "optimizer, schedule and RNG begin"),
        ("ignore_data_skip", "its rows begin"),
    ):
        if saves and getattr(args, name, False):
            log.warning(
                "fedtune: %s is set: when this script is started again within a run, %s anew. "
                "Leave it out.",
                name,
                lost,
            )


def _problem(trainer: Trainer, options: Options) -> str:
    if trainer.is_deepspeed_enabled:
        return (
            "expected no DeepSpeed, received a trainer with it; its engine owns parameters and "
            "optimizer. Use DDP or FSDP2."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_xla_enabled or (
        trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 1
    ):
        return (
            "expected DDP or FSDP2, received FSDP1, which flattens parameters. Set fsdp_version 2 "
            "in fsdp_config."
        )
    if trainer.lr_scheduler is not None and not trainer._created_lr_scheduler:
        return (
            "expected a schedule that the Trainer makes, received one in optimizers=(...), whose "
            "curve cannot be planned for all rounds. Use --lr_scheduler_type."
        )
    problem = refused_value(vars(trainer.args), ["optim"])
    if problem:
        return problem
    if options.restart_lr and (why := refused_value(vars(trainer.args), ["lr_scheduler_type"])):
        return f"restart_lr restarts schedules of steps; {why}"
    if trainer.args.auto_find_batch_size:
        return (
            "expected a fixed batch size, received auto_find_batch_size, which starts training "
            "again within a round. Set per_device_train_batch_size."
        )
    has_reference = "ref" in getattr(model_of(trainer), "peft_config", {})
    if has_reference and getattr(trainer, "precompute_ref_logps", False):
        return (
            "expected DPO without precompute_ref_log_probs, received it: the reference is the "
            "run's first adapter, not this site's. Turn it off, or give peft_config=."
        )
    return ""
