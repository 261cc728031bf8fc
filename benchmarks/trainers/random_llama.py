"""A patched Trainer whose steps cost next to nothing, so that what a round takes is federation.

    fedtune join --superlink HOST:PORT -- python benchmarks/trainers/random_llama.py --marks DIR

The model is a Llama with random weights; its LoRA adapter has --adapter_mb MiB in fp32. When a step
begins and ends is noted in --marks, one JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fedtune

TINY = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
}
LARGE = {  # 0.11 B parameters
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
}


class Rows(Dataset):
    """Random tokens, the same for the same index."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(self.vocabulary, (self.length,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


class Marks(TrainerCallback):
    """Notes the times of steps; comes before the federation's callback."""

    def __init__(self, directory: Path) -> None:
        self.file = (directory / f"{os.getpid()}.jsonl").open("w", buffering=1)

    def on_step_begin(self, args, state, control, **others):
        """The batch is there."""
        self._note("begin", state.global_step + 1)

    def on_step_end(self, args, state, control, **others):
        """The optimizer has stepped."""
        self._note("end", state.global_step)

    def _note(self, what: str, step: int) -> None:
        self.file.write(json.dumps({"what": what, "step": step, "time": time.time()}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--marks", type=Path, required=True, help="directory")
    parser.add_argument("--adapter_mb", type=float, default=5.0, help="MiB, of the tiny model")
    parser.add_argument("--large", action="store_true", help="0.11 B parameters, LoRA of rank 16")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(**(LARGE if args.large else TINY), max_position_embeddings=256)
    lora = large_lora() if args.large else tiny_lora(config, args.adapter_mb)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=1,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Rows(config.vocab_size, 64 if args.large else 8),
            callbacks=[Marks(args.marks)],
        )
        fedtune.patch(trainer)
        trainer.train()


def tiny_lora(config: LlamaConfig, megabytes: float) -> LoraConfig:
    """Two square matrices a layer, as many ranks as the bytes need: 80 for 5 MiB."""
    bytes_a_rank = config.num_hidden_layers * 2 * 2 * config.hidden_size * 4
    rank = max(1, round(megabytes * 2**20 / bytes_a_rank))
    return LoraConfig(r=rank, target_modules=["q_proj", "v_proj"])


def large_lora() -> LoraConfig:
    return LoraConfig(r=16, target_modules=["q_proj", "v_proj", "o_proj"])


if __name__ == "__main__":
    main()
