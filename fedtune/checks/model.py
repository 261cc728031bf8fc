"""Rules about the base model, the adapter and the rows."""

from __future__ import annotations

from pathlib import Path

from fedtune.config import Arguments

__all__ = ["LORA", "adapter", "data", "quantized"]

LORA = ("lora", "dora")
PROMPTS = ("p_tuning", "prompt_tuning", "prefix_tuning")


def quantized(args: Arguments) -> str | None:
    """One quantization, and trained weights that are not quantized."""
    model, method = args.model, args.adapter.peft_method
    if model.load_in_4bit and model.load_in_8bit:
        return "--load_in_4bit and --load_in_8bit are both set. Keep one of them."
    if (model.load_in_4bit or model.load_in_8bit) and method == "none":
        flag = "--load_in_4bit" if model.load_in_4bit else "--load_in_8bit"
        return f"{flag} with --peft_method none: quantized weights cannot be trained. Use lora."
    return None


def adapter(args: Arguments) -> str | None:
    """Settings of this kind of adapter only."""
    adapter, method = args.adapter, args.adapter.peft_method
    if adapter.use_rslora and method not in LORA:
        return f"--use_rslora needs --peft_method lora or dora, received {method}. Leave it out."
    if adapter.modules_to_save and method in (*PROMPTS, "none"):
        return f"--modules_to_save does not go with --peft_method {method}. Leave it out."
    if adapter.prefix_projection and method != "prefix_tuning":
        return f"--prefix_projection needs --peft_method prefix_tuning, received {method}."
    if adapter.encoder_reparameterization_type != "MLP" and method != "p_tuning":
        return f"--encoder_reparameterization_type needs --peft_method p_tuning, received {method}."
    encoder = method == "p_tuning" or adapter.prefix_projection
    if adapter.encoder_hidden_size != 128 and not encoder:
        return (
            "--encoder_hidden_size needs --peft_method p_tuning, or prefix_tuning with "
            f"--prefix_projection; received {method}."
        )
    return None


def data(args: Arguments) -> str | None:
    """One source of rows that is there, and what its partition needs."""
    data = args.data
    if data.dataset_name and data.train_file:
        return "--dataset_name and --train_file are both set. Keep one of them."
    if data.partition == "column" and not data.partition_column:
        return "--partition column needs --partition_column NAME, the column that owns a row."
    if data.partition_column and data.partition in ("iid", "size"):
        return (
            f"--partition_column has no effect with --partition {data.partition}. "
            "Use --partition column or dirichlet."
        )
    for flag, file in (("train_file", data.train_file), ("eval_file", data.eval_file)):
        if file and not Path(file).is_file():
            return f"--{flag}: no file {file}. Paths start at the working directory."
    start = args.adapter.init_adapter
    if start and not Path(start).is_dir():
        return f"--init_adapter: no directory {start}. Give the adapter/ of a run."
    return None
