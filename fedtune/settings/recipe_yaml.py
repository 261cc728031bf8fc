"""What a recipe's YAML holds for one kind of adapter or model only, and what is said of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["demo_hint", "rate_of_method"]

# Rates to begin with: LoRA and DoRA (QLoRA, arXiv 2305.14314, table 9), IA3 (arXiv 2205.05638),
# full tuning (Alpaca's); prompts are few and far from the weights, and take 10 to 100 times more.
RATES = {
    "lora": 2e-4,
    "dora": 2e-4,
    "ia3": 3e-3,
    "p_tuning": 5e-3,
    "prompt_tuning": 3e-2,
    "prefix_tuning": 1e-2,
    "none": 2e-5,
}
ALIKE = {"lora", "dora"}  # take one and the same rate


def rate_of_method(values: Mapping[str, Any], flags: Mapping[str, Any]) -> float | None:
    """Learning rate of `--peft_method` where that of the YAML is for another kind; else None."""
    method, meant = flags.get("peft_method"), values.get("peft_method", "lora")
    if method is None or "learning_rate" in flags or "learning_rate" not in values:
        return None
    return None if method == meant or {method, meant} <= ALIKE else RATES[method]


def demo_hint(file: Path, model: str | None) -> list[str]:
    """Where the settings for the embedded model are, if it is run with a `file` for another."""
    name = "demo.yaml" if file.stem == "lora_sft" else f"demo_{file.stem}.yaml"
    demo = file.with_name(name)
    if model is not None or not demo.is_file():
        return []
    return [
        f"the settings of {_shown(file)} are for a real model; those for the tiny one in the "
        f"package: --config {_shown(demo)}"
    ]


def _shown(file: Path) -> str:
    return min(str(file), os.path.relpath(file), key=len)
