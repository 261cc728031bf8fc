"""Small trainers, and what they trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from fedtune.adapters import collect
from tests.federation.small import StepLog, small_rows, training_arguments
from tests.tiny import tiny_llama


def small_model(dropout: float = 0.1, **given: Any) -> nn.Module:
    """A tiny Llama with LoRA on q and v."""
    base = tiny_llama(1)
    torch.manual_seed(42)
    return get_peft_model(base, LoraConfig(**{**lora(dropout), **given}))


def lora(dropout: float = 0.1) -> dict[str, Any]:
    return {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": dropout,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }


def small_trainer(
    directory: Path | str,
    *,
    cls: type[Trainer] = Trainer,
    model: nn.Module | None = None,
    dropout: float = 0.1,
    rows: int = 13,
    train: Any = None,
    callbacks: list[Any] | None = None,
    args: Any = None,
    **given: Any,
) -> Trainer:
    """13 rows in batches of 2: rounds of 4 steps end in the middle of an epoch."""
    return cls(
        model=model or small_model(dropout),
        args=args or training_arguments(directory, **{"max_steps": 12, **given}),
        train_dataset=small_rows(rows) if train is None else train,
        eval_dataset=small_rows(6, seed=99),
        callbacks=callbacks,
    )


@dataclass
class Trained:
    """What a training has left."""

    losses: list[tuple[float, ...]]
    params: dict[str, Tensor]
    history: list[dict[str, Any]]
    steps: int


def train(trainer: Trainer) -> Trained:
    """Train, and say what became of it."""
    log = StepLog()
    trainer.add_callback(log)
    output = trainer.train()
    trainer.remove_callback(log)
    assert trainer.model is not None
    return Trained(log.rows, collect(trainer.model), trainer.state.log_history, output.global_step)


def scores(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step and eval loss of every evaluation in a Trainer's log."""
    return [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
