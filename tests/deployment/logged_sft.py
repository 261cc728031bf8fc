"""recipes/lora_sft.py whose Trainers also write each logged step to FEDTUNE_TEST_STEPS."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import TrainerCallback

import fedtune


def _recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "lora_sft.py"
    spec = importlib.util.spec_from_file_location("lora_sft", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = _recipe()


class Steps(TrainerCallback):
    """Appends a JSON line per logged step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            kept = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}
            with open(os.environ["FEDTUNE_TEST_STEPS"], "a") as file:
                file.write(json.dumps({"step": state.global_step, **kept}) + "\n")


def build_model(args: Any) -> Any:
    return RECIPE.build_model(args)


def build_trainer(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Any:
    trainer = RECIPE.build_trainer(args, model, tokenizer, train, evaluation)
    trainer.add_callback(Steps())
    return trainer


if __name__ == "__main__":
    fedtune.launch(build_model, build_trainer)
