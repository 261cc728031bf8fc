"""Clients with different LoRA ranks: each trains, and sends, only as much as it can afford.

python recipes/mixed_ranks.py --config recipes/demo_mixed_ranks.yaml   # the tiny model
python recipes/mixed_ranks.py --strategy flora                           # or hetlora, raflora
python recipes/mixed_ranks.py --num_clients 2 --client_ranks 2,32 --compare local

The two functions are those of any recipe: a model is built at the rank in `args.adapter`, and its
alpha goes with the rank, so that alpha / r is the same everywhere. docs/lora-rules.md says what
each method does with mixed ranks.
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
