"""QLoRA bases: bitsandbytes settings, and a base that stays trainable after it was evaluated."""

from __future__ import annotations

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig

from fedtune.config import ModelArguments
from fedtune.errors import ConfigError

__all__ = ["keep_trainable", "quantization_config"]


def quantization_config(model: ModelArguments) -> BitsAndBytesConfig | None:
    """Bitsandbytes' settings for `--load_in_4bit` / `--load_in_8bit`; None for neither.

    The head stays in full precision (transformers' default). Computes in fp32 on a CPU.

    Raises:
        ConfigError: both are asked for.
    """
    if model.load_in_4bit and model.load_in_8bit:
        raise ConfigError(
            "--load_in_4bit and --load_in_8bit: expected at most one, received both. Drop one."
        )
    if model.load_in_4bit:
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )
    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return None


def keep_trainable(model: nn.Module) -> None:
    """Switch off bitsandbytes' 4-bit inference kernel for CPUs with AVX512-BF16.

    The first evaluation would repack the weights in place (scales rounded to bf16), and the kernel
    for the new layout has no backward: training would go on with no gradient and no error.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
