"""Equal samples, whatever the Trainer dropped, packed or left out: recounted from its batches."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fedtune.adapters import load_exported
from fedtune.client.undisturbed import get_rng, same_state
from fedtune.compare.arms import ArmInput, run_arm
from fedtune.compare.schedule import steps_to_see
from fedtune.run.federate import federate_control
from fedtune.server.checkpoint import ServerState
from tests.federation.small import (
    run_small,
    same_tensors,
    small_rows,
    small_worker,
    training_arguments,
)
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(pad_token="<unk>", eos_token="</s>")


class Recount(TrainerCallback):
    """Rows of each optimizer step by their content, read from what enters `training_step`."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows = 0

    def of(self, trainer: Trainer) -> Trainer:
        step = trainer.training_step

        def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.rows += rows_by_content(inputs)
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = noted
        trainer.add_callback(self)
        return trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(self.rows)


def rows_by_content(inputs: Any) -> int:
    """Every row of these tests begins with the token 1, and has it nowhere else."""
    return int((inputs["input_ids"] == 1).sum())


def rows(number: int, *, cut: bool = False) -> Any:
    """Rows of 3 to 12 tokens; with `cut`, every third has no label token and is dropped by trl."""

    def shape(row: Any, place: int) -> Any:
        length = 3 + (place * 7) % 10
        ids = [1, *(2 + token % 30 for token in row["input_ids"][1:length])]
        dropped = cut and place % 3 == 0
        return {"input_ids": ids, "labels": [-100] * length if dropped else ids}

    return small_rows(number, seed=number).map(shape, with_indices=True)


def build_sft(recounts: dict[str, Recount], args: Any, model: Any, _: Any, *rows: Any) -> Trainer:
    train, evaluation = rows
    trainer = SFTTrainer(
        model=model,
        args=args.training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
    )
    name = Path(args.training.output_dir).name
    return recounts.setdefault(name, Recount()).of(trainer)


SETTINGS: dict[str, dict[str, Any]] = {
    "dropped": {"cut": True, "gradient_accumulation_steps": 2},
    "packed, dropped, padded": {
        "cut": True,
        "packing": True,
        "max_length": 16,
        "pad_to_multiple_of": 32,
        "gradient_accumulation_steps": 2,
    },
    "drop_last": {"dataloader_drop_last": True, "gradient_accumulation_steps": 3},
    "by length, packed": {
        "packing": True,
        "max_length": 16,
        "train_sampling_strategy": "group_by_length",
    },
}


def federated(directory: Path, clients: int, settings: dict[str, Any], **run: Any) -> Any:
    """A run of 3 rounds over several epochs, ready for the arms, and the recounts by trainer."""
    given = {"max_length": None, "packing": False, **settings}
    cut = given.pop("cut", False)
    recounts: dict[str, Recount] = {}
    training = training_arguments(
        directory,
        cls=SFTConfig,
        activation_checkpointing=False,
        gradient_checkpointing=False,
        **given,
    )
    worker = small_worker(
        directory / "clients",
        clients=clients,
        build_trainer=partial(build_sft, recounts),
        training=training,
        dropout=0.0,
    )
    worker.train = {f"client-{k}": rows(19 - 4 * k, cut=cut) for k in range(clients)}
    worker.evaluation = rows(8)  # one batch: drop_last leaves out the rest here too
    first: list[ServerState] = []
    state = run_small(
        worker,
        on_round=lambda state, record: first.append(copy.deepcopy(state)),
        steps=7,
        **run,
    )
    arms = ArmInput(
        args=worker.args,
        worker=worker,
        start=first[0],
        history=state.history,
        directory=directory / "arms",
        federate=partial(federate_control, worker.args),
    )
    return arms, state, recounts


@pytest.mark.parametrize("name", SETTINGS)
def test_one_client_is_centralized_to_the_bit(tmp_path: Path, name: str) -> None:
    arms, state, recounts = federated(tmp_path, 1, SETTINGS[name])
    arm = run_arm("centralized", arms)
    assert arm["eval_loss"] == [record["eval_loss"] for record in state.history]
    assert arm["samples"] == [record["samples"] for record in state.history]
    assert arm["samples"][1:] == [recounts["client-0"].steps[7 * k - 1] for k in (1, 2, 3)]
    assert recounts["centralized"].steps == recounts["client-0"].steps
    assert arm["equal_samples"]
    params, _, _ = load_exported(tmp_path / "arms" / "centralized" / "adapter")
    assert same_tensors(params, state.params)


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("centralized", "dropped"),
        ("centralized", "packed, dropped, padded"),
        ("centralized_large_batch", "packed, dropped, padded"),
        ("centralized_large_batch", "drop_last"),
    ],
)
def test_pooled_arms_end_within_a_batch(tmp_path: Path, name: str, arm: str) -> None:
    """Two unequal clients, one asked in a round: the arm ends at the first step that reaches."""
    arms, state, recounts = federated(tmp_path, 2, SETTINGS[name], fraction_train=0.5)
    found = run_arm(arm, arms)
    target = state.history[-1]["samples"]
    trained = sum(recount.rows for recount in recounts.values()) - recounts[arm].rows
    assert target == trained  # every client's own rows, over all rounds
    before, last = recounts[arm].steps[-2:]
    assert before < target <= last == found["samples"][-1]
    assert found["equal_samples"]
    assert len(found["eval_loss"]) == len(state.history)


@pytest.mark.parametrize(
    ("strategy", "accumulation"), [("random", 3), ("group_by_length", 1), ("batch_rebalance", 3)]
)
def test_the_walk_is_what_training_does(tmp_path: Path, strategy: str, accumulation: int) -> None:
    """For each number of samples the step that reaches it; no RNG is moved by looking."""
    recounts: dict[str, Recount] = {}
    training = training_arguments(
        tmp_path,
        cls=SFTConfig,
        packing=True,
        max_length=16,
        max_steps=12,
        activation_checkpointing=False,
        gradient_checkpointing=False,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy=strategy,
    )
    worker = small_worker(tmp_path, training=training, dropout=0.0)
    trainer = build_sft(recounts, worker.args, worker.model, None, rows(19, cut=True), None)
    before = get_rng()
    steps = [steps_to_see(trainer, samples) for samples in range(1, 30)]
    assert same_state(before, get_rng())
    trainer.train()
    (recount,) = recounts.values()
    assert steps == [1 + sum(rows < samples for rows in recount.steps) for samples in range(1, 30)]


def test_counts_that_differ_are_no_equal_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, state, _ = federated(tmp_path, 1, SETTINGS["dropped"])
    monkeypatch.setattr("fedtune.compare.arms.steps_to_see", lambda trainer, samples: 5)
    arm = run_arm("centralized", arms)
    assert not arm["equal_samples"]
    assert len(arm["samples"]) == len(state.history)
    assert arm["samples"][-1] < state.history[-1]["samples"]
