"""A site's script that is slow enough to be killed in the middle of a round.

It writes one line to STEPS before every optimizer step: process id, step, digest of the adapter.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fedtune
from fedtune.adapters import collect
from fedtune.assets import MODEL_DIR
from fedtune.files import append_line


class Steps(TrainerCallback):
    """Writes down every step, takes its time, and spoils the adapter when told to."""

    def __init__(self, log: Path, step_s: float, nan_from: int) -> None:
        self._log, self._step_s, self._nan_from = log, step_s, nan_from

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        rate = given["lr_scheduler"].get_last_lr()[0]
        row = (os.getpid(), state.global_step, f"{rate:.6g}", _digest(given["model"]))
        append_line(self._log, " ".join(map(str, row)))
        time.sleep(self._step_s)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if 0 < self._nan_from <= state.global_step:
            with torch.no_grad():
                next(p for p in given["model"].parameters() if p.requires_grad).fill_(torch.nan)


def _digest(model: Any) -> str:
    params = collect(model)
    data = b"".join(params[name].numpy().tobytes() for name in sorted(params))
    return hashlib.sha256(data).hexdigest()[:12]


def _rows(tokenizer: Any, seed: int) -> Dataset:
    words = [f"Row {number} of site {seed}: all is well." for number in range(10)]
    ids = tokenizer(words)["input_ids"]
    length = min(map(len, ids))
    rows = [row[:length] for row in ids]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--step_s", type=float, default=0.3)
    parser.add_argument("--save_steps", type=int, default=0)
    parser.add_argument("--nan_from", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    torch.manual_seed(42)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR),
        LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    saving = {"save_strategy": "steps", "save_steps": given.save_steps, "save_total_limit": 2}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(given.directory / "output"),
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=given.rows,
            **(saving if given.save_steps else {"save_strategy": "no"}),
        ),
        train_dataset=_rows(tokenizer, given.rows),
        eval_dataset=_rows(tokenizer, 0).select(range(4)),
        callbacks=[Steps(given.directory / "steps.log", given.step_s, given.nan_from)],
    )
    fedtune.patch(trainer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
