"""One federated client is a plain Trainer run, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from fedtune.adapters import collect
from tests.federation.small import (
    ROUNDS,
    STEPS,
    StepLog,
    arguments,
    build_model,
    build_trainer,
    run_small,
    same_tensors,
    small_rows,
    small_worker,
    training_arguments,
)
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(pad_token="<unk>", eos_token="</s>")


def build_sft(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> SFTTrainer:
    return SFTTrainer(
        model=model,
        args=args.training,
        train_dataset=train.remove_columns("labels"),
        eval_dataset=None if evaluation is None else evaluation.remove_columns("labels"),
        processing_class=TOKENIZER,
    )


def plain(build: Callable[..., Trainer], training: Any, dropout: float) -> tuple[Any, StepLog]:
    """What a script without a federation does: build, train, no evaluation."""
    args = arguments(training, dropout=dropout)
    training.max_steps = ROUNDS * STEPS
    model, tokenizer = build_model(args)
    trainer = build(args, model, tokenizer, small_rows(13), None)
    log = StepLog()
    trainer.add_callback(log)
    trainer.train()
    return collect(trainer.model), log


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_one_client_is_the_plain_trainer(
    tmp_path: Path, kind: str, accumulation: int, dropout: float, precision: str
) -> None:
    """Rounds of 4 steps end inside epochs of 7, 4 or 3 steps; only the federation evaluates."""
    build = build_sft if kind == "sft" else build_trainer
    given = {
        "cls": SFTConfig,
        "max_length": None,
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
    }
    settings = {
        "gradient_accumulation_steps": accumulation,
        "bf16": precision == "bf16",
        **(given if kind == "sft" else {}),
    }
    expected, plain_log = plain(build, training_arguments(tmp_path / "plain", **settings), dropout)

    training = training_arguments(tmp_path / "federated", **settings)
    worker = small_worker(
        tmp_path / "federated", build_trainer=build, training=training, dropout=dropout
    )
    log = StepLog()
    worker.trainer("client-0").add_callback(log)
    state = run_small(worker)

    assert len(plain_log.rows) == ROUNDS * STEPS
    assert log.rows == plain_log.rows
    assert same_tensors(state.params, expected)
    assert len({record["eval_loss"] for record in state.history}) == ROUNDS + 1
