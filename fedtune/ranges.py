"""Ranges of single settings, one row each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from fedtune.config import Arguments, FederationArguments

__all__ = ["Range", "federation_ranges", "ranges"]


class Range(NamedTuple):
    """A flag, its value, whether the value may stay, and what was expected. None always may."""

    flag: str
    value: Any
    holds: bool
    expected: str


def _positive(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def _at_least(least: int, value: float | None) -> bool:
    return value is not None and value >= least


def federation_ranges(fed: FederationArguments) -> Iterator[Range]:
    """Rows of the federation; NaN satisfies none of them."""
    for flag, count, least in (
        ("num_clients", fed.num_clients, 1),
        ("num_rounds", fed.num_rounds, 1),
        ("steps_per_round", fed.steps_per_round, 1),
        ("max_failed_rounds", fed.max_failed_rounds, 0),
        ("save_every_rounds", fed.save_every_rounds, 1),
    ):
        yield Range(flag, count, _at_least(least, count), f"a whole number >= {least}")
    for flag, amount in (
        ("epochs_per_round", fed.epochs_per_round),
        ("max_update_norm", fed.max_update_norm),
        ("round_timeout_s", fed.round_timeout_s),
        ("cpus_per_client", fed.cpus_per_client),
    ):
        yield Range(flag, amount, _positive(amount), "a number > 0")
    for flag, share in (
        ("fraction_train", fed.fraction_train),
        ("max_client_weight", fed.max_client_weight),
    ):
        yield Range(flag, share, 0 < share <= 1, "a share > 0 and <= 1")
    gpus = fed.gpus_per_client
    yield Range("gpus_per_client", gpus, 0 <= gpus < math.inf, "a number >= 0")


def ranges(args: Arguments) -> Iterator[Range]:
    """Every row."""
    adapter, data, training = args.adapter, args.data, args.training
    yield from federation_ranges(args.federation)
    for flag, count, least in (
        ("lora_r", adapter.lora_r, 1),
        ("num_virtual_tokens", adapter.num_virtual_tokens, 1),
        ("encoder_hidden_size", adapter.encoder_hidden_size, 1),
        ("max_rows", data.max_rows, 2),
        ("min_rows", data.min_rows, 1),
        ("per_device_train_batch_size", training.per_device_train_batch_size, 1),
        ("per_device_eval_batch_size", training.per_device_eval_batch_size, 1),
        ("gradient_accumulation_steps", training.gradient_accumulation_steps, 1),
    ):
        yield Range(flag, count, _at_least(least, count), f"a whole number >= {least}")
    for flag, amount in (
        ("partition_alpha", data.partition_alpha),
        ("lora_alpha", adapter.lora_alpha),
    ):
        yield Range(flag, amount, _positive(amount), "a number > 0")
    share = data.eval_fraction
    yield Range("eval_fraction", share, 0 < share < 1, "a share > 0 and < 1")
    yield Range("lora_dropout", adapter.lora_dropout, 0 <= adapter.lora_dropout < 1, ">= 0 and < 1")
    rate = training.learning_rate
    yield Range("learning_rate", rate, 0 <= rate < math.inf, "a number >= 0")
    for seed in args.seeds:
        yield Range("seeds", seed, 0 <= seed < 2**32, "numbers from 0 to 2**32 - 1")
