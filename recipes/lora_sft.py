"""Federated instruction or text tuning with LoRA, DoRA, IA3, a prompt method or QLoRA.

python recipes/lora_sft.py --config recipes/demo.yaml    # the model and corpus in the package
python recipes/lora_sft.py --compare all --seeds 1,2,3
python recipes/lora_sft.py --model_name_or_path DIR --train_file rows.jsonl

Rows: instruction/input/output, question/answer, prompt/completion, messages, or text. The loss
covers answers only, where rows or chat template tell them from the rest. `--dry_run` shows rows,
bytes, memory and steps first.
"""

from trl import SFTTrainer

import fedtune
from fedtune.adapters import attach_adapter, load_base
from fedtune.data import as_language_rows, sft_inputs


def build_model(args):
    """Base model with its adapter, and the tokenizer; once per process."""
    model, tokenizer = load_base(args.model, task="causal_lm")
    return attach_adapter(model, args.adapter, "causal_lm", args.training.seed), tokenizer


def build_trainer(args, model, tokenizer, train, evaluation):
    """A trl SFTTrainer over one client's rows."""

    def rows_of(silo):
        return as_language_rows(silo, args.data, tokenizer)

    inputs = sft_inputs(rows_of, args, model, tokenizer, train, evaluation)
    return SFTTrainer(model=model, processing_class=tokenizer, **inputs)


if __name__ == "__main__":
    fedtune.launch(build_model, build_trainer)
