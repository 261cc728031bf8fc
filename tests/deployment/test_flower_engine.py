"""`--engine flower` trains what `--engine inline` trains: each logged step and the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import SFTConfig

from fedtune.adapters import collect, load_exported
from fedtune.run.prepare import load_silos
from fedtune.settings import parse_arguments
from tests.conftest import REPOSITORY
from tests.deployment import logged_sft
from tests.recipes.runs import run_here

SCRIPT = REPOSITORY / "tests" / "deployment" / "logged_sft.py"
ROUNDS, STEPS = 2, 2
# Dropout and a cosine show at once when a random state or a step count is another one.
FLAGS = [
    *("--config", str(REPOSITORY / "recipes" / "lora_sft.yaml"), "--max_rows", "60"),
    *("--partition", "iid", "--num_rounds", str(ROUNDS), "--steps_per_round", str(STEPS)),
    *("--per_device_train_batch_size", "4", "--logging_steps", "1"),
    *("--lr_scheduler_type", "cosine", "--lora_dropout", "0.1"),
]

Federate = Callable[..., Path]


@pytest.fixture
def federate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federate:
    """Run the recipe; returns its output directory, which also holds `steps.jsonl`."""

    def run(engine: str, clients: int, *flags: str) -> Path:
        output = tmp_path / engine
        monkeypatch.setenv("FEDTUNE_TEST_STEPS", str(tmp_path / f"{engine}.jsonl"))
        where = ("--engine", engine, "--num_clients", str(clients), "--output_dir", output)
        done = run_here(SCRIPT, *FLAGS, *flags, *where)
        assert done.status == 0, done.out + done.err
        (tmp_path / f"{engine}.jsonl").rename(output / "steps.jsonl")
        return output

    return run


def steps_of(file: Path) -> list[dict[str, float]]:
    """All clients' steps, in an order that does not depend on who was quicker."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["step"], row["loss"]))


def adapter_of(output: Path) -> dict[str, Tensor]:
    return load_exported(output / "adapter")[0]


def assert_same(left: Path, right: Path, clients: int) -> None:
    steps = steps_of(left / "steps.jsonl")
    assert len(steps) == clients * ROUNDS * STEPS
    assert steps == steps_of(right / "steps.jsonl")
    assert_equal(adapter_of(left), adapter_of(right))


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def plain(directory: Path) -> dict[str, Tensor]:
    """The same functions and rows without a federation."""
    flags = [*FLAGS, "--num_clients", "1", "--output_dir", str(directory)]
    args: Any = parse_arguments(SFTConfig, flags, recipe_file=SCRIPT)
    args.training.max_steps = ROUNDS * STEPS
    model, tokenizer = logged_sft.build_model(args)
    trainer = logged_sft.build_trainer(args, model, tokenizer, load_silos(args).train[0], None)
    trainer.train()
    return collect(trainer.model)


def test_one_client_is_the_plain_trainer(
    tmp_path: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real processes: a server, a node and a trainer. Bit by bit, so without a tolerance."""
    flower, inline = federate("flower", 1), federate("inline", 1)
    assert_same(flower, inline, 1)
    monkeypatch.setenv("FEDTUNE_TEST_STEPS", str(tmp_path / "plain.jsonl"))
    params = plain(tmp_path / "plain")
    assert steps_of(tmp_path / "plain.jsonl") == steps_of(flower / "steps.jsonl")
    assert_equal(params, adapter_of(flower))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "nf4"])
def test_two_clients_are_the_same_in_both_engines(federate: Federate, codec: str) -> None:
    flower, inline = (federate(engine, 2, "--codec", codec) for engine in ("flower", "inline"))
    assert_same(flower, inline, 2)


@pytest.mark.slow
def test_a_slow_client_does_not_hold_the_rounds(tmp_path: Path) -> None:
    """FedBuff with real delays: the last client has three times as many rows as the first."""
    output = tmp_path / "run"
    flags = ["--config", str(REPOSITORY / "recipes" / "lora_sft.yaml"), "--engine", "flower"]
    flags += ["--strategy", "fedbuff", "--strategy_args", "size=1", "--num_clients", "3"]
    flags += ["--partition", "size", "--epochs_per_round", "1", "--num_rounds", "6"]
    done = run_here(REPOSITORY / "recipes" / "lora_sft.py", *flags, "--output_dir", output)
    assert done.status == 0, done.out + done.err
    records = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert [len(record["replies"]) for record in records] == [1] * 6
    assert not any(record["refused"] for record in records)
    ages = [record["round"] - record["replies"][0]["round"] for record in records]
    assert ages[0] == 0 < max(ages)
