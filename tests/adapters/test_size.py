"""What exchanging a whole model would take, recounted from its file."""

from __future__ import annotations

import math

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open

from fedtune.adapters.build import load_base
from fedtune.adapters.size import exchanged_bytes, resident_bytes
from fedtune.assets import MODEL_DIR
from fedtune.config import ModelArguments

LORA = LoraConfig(r=16, target_modules="all-linear", modules_to_save=["lm_head"])
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)


def bytes_of_file() -> int:
    """fp32; the head is tied to the embedding, and written once."""
    with safe_open(f"{MODEL_DIR}/model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return sum(4 * math.prod(shape) for name, shape in shapes.items() if name != "lm_head.weight")


@pytest.mark.parametrize("held", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
@pytest.mark.parametrize("adapter", [None, LORA, PROMPT], ids=["none", "lora", "prompt"])
def test_full_bytes_are_those_of_the_base_alone(held: dict[str, bool], adapter: object) -> None:
    base, _ = load_base(ModelArguments(**held), task="causal_lm")
    model = base if adapter is None else get_peft_model(base, adapter)
    assert exchanged_bytes(model) == bytes_of_file()
    if "load_in_4bit" in held:
        assert resident_bytes(base) < bytes_of_file()
    elif adapter is not None and not held:
        assert resident_bytes(model) > bytes_of_file()
