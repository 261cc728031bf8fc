"""What a resumed run must share with its beginning."""

from __future__ import annotations

import dataclasses
import json

import pytest
from trl import SFTConfig

from fedtune import decisive
from fedtune.decisive import run_settings
from fedtune.settings import parse_arguments


def settings_of(text):
    return run_settings(parse_arguments(SFTConfig, text.split()))


def test_run_settings_are_json_and_stable():
    settings = settings_of("--lr_scheduler_type cosine --seeds 1,2")
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["lr_scheduler_type"], settings["seeds"]) == ("cosine", [1, 2])
    assert settings_of("--seed 3") == settings_of("--seeds 3")


@pytest.mark.parametrize(
    "text",
    [
        "--model_name_or_path x",
        "--lora_r 4",
        "--partition size",
        "--num_rounds 4",
        "--strategy x",
        "--codec int8",
        "--codec_args min_size=9",
        "--seeds 1",
        "--data_seed 1",
        "--learning_rate 1",
        "--per_device_train_batch_size 1",
        "--pad_to_multiple_of 8",
        "--truncation_mode keep_end",
        '--dataset_kwargs {"add_special_tokens":false}',
        "--optim_target_modules attn",
        "--torch_compile",
    ],
)
def test_what_a_resumed_run_may_not_change(text):
    assert settings_of(text) != settings_of("")


@pytest.mark.parametrize(
    "text",
    [
        "--round_timeout_s 1",
        "--max_failed_rounds 1",
        "--save_every_rounds 2",
        "--output_dir x",
        "--resume",
        "--track wandb",
        "--logging_steps 1",
        "--dataloader_num_workers 2",
        "--per_device_eval_batch_size 1",
    ],
)
def test_what_a_resumed_run_may_change(text):
    assert settings_of(text) == settings_of("")


def test_names_that_are_free_exist():
    """A setting that is renamed would decide without a word."""
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    assert {name for name in decisive._FREE_TRAINING if name not in names} == set()
