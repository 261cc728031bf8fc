"""What a client can train in a round at most, as it tells the server before the first one.

The server refuses a reply that claims more, and an honest one never does: counts that are above
after all (a collator that makes many rows of one) are sent as what was declared.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from transformers import Trainer

from fedtune.client.replies import LocalResult
from fedtune.transport.messages import MOST_LENGTH, Declared

__all__ = ["declared", "within"]

log = logging.getLogger(__name__)

PAIR = 2  # a preference row is two lines
UNSURE = 4  # models and tokenizers name a length that rows may be beyond
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
NO_LIMIT = 10**9  # a tokenizer's length above this means that it knows none


def declared(trainer: Trainer, steps: int, processes: int = 1) -> Declared:
    """Of a Trainer that takes so many steps a round, on so many processes."""
    args: Any = trainer.args
    lines = args.train_batch_size * args.gradient_accumulation_steps * processes
    length = _longest(trainer)
    packed = bool(getattr(args, "packing", False) or getattr(args, "padding_free", False))
    rows: Any = trainer.train_dataset
    return Declared(
        rows=len(rows) if hasattr(rows, "__len__") else 0,
        steps=steps,
        rows_per_step=lines * (length if packed else 1),  # a row has a token at least
        tokens_per_step=lines * length,
    )


def within(result: LocalResult, most: Declared) -> LocalResult:
    """The result with counts that are not above what was declared."""
    steps = max(1, result.num_steps)
    examples, tokens = (
        min(count, steps * bound) if bound else count
        for count, bound in (
            (result.num_examples, most.rows_per_step),
            (result.num_tokens, most.tokens_per_step),
        )
    )
    if (examples, tokens) != (result.num_examples, result.num_tokens):
        log.warning(
            "fedtune: a round of %d steps had %d rows and %d tokens, more than declared; %d and %d "
            "are sent as its weight.",
            result.num_steps,
            result.num_examples,
            result.num_tokens,
            examples,
            tokens,
        )
    return replace(result, num_examples=examples, num_tokens=tokens)


def _longest(trainer: Trainer) -> int:
    """Tokens of a row, with room to spare where nothing cuts rows for certain."""
    args: Any = trainer.args
    cut = getattr(args, "max_length", None)
    if isinstance(cut, int) and cut > 0:
        return min(PAIR * cut, MOST_LENGTH)
    config: Any = getattr(trainer.model, "config", None)
    named = [
        getattr(trainer.data_collator, "max_length", None),
        getattr(trainer.processing_class, "model_max_length", None),
        *(getattr(config, name, None) for name in LENGTHS),
    ]
    known = [int(n) for n in named if isinstance(n, int) and 0 < n < NO_LIMIT]
    return min(UNSURE * max(known), MOST_LENGTH) if known else MOST_LENGTH
