"""Tokens per row, against what the model can read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from fedtune.data.embeddings import check_tokens
from fedtune.data.origin import UNKNOWN, row_name
from fedtune.errors import DataError

__all__ = [
    "check_lengths",
    "check_row_lengths",
    "context_length",
    "readable_length",
    "token_lengths",
    "virtual_tokens",
]

log = logging.getLogger(__name__)

BATCH = 1_000
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def token_lengths(rows: Dataset, tokenizer: Any) -> list[int]:
    """Tokens of each converted row as SFTTrainer counts them before truncation, its EOS included.

    Classification rows (with `labels`) get no EOS.
    """
    return [len(ids) for ids in token_ids(rows, tokenizer)]


def token_ids(rows: Dataset, tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of each converted row, as `token_lengths` counts them."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        if "messages" in batch:
            for turns in batch["messages"]:
                ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
                yield ids["input_ids"]
        else:
            # not verbose: too long is this module's to judge, not a warning of the tokenizer
            yield from tokenizer(_texts(batch, tokenizer), verbose=False)["input_ids"]


def context_length(model_config: Any) -> int | None:
    """Positions that the model can read, or None where its configuration names no limit."""
    text_config = getattr(model_config, "get_text_config", None)
    config = text_config() if text_config is not None else model_config
    for key in CONTEXT_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def virtual_tokens(model: Any) -> int:
    """Positions that a prompt-learning adapter on `model` takes from the context; 0 without one."""
    config = getattr(model, "active_peft_config", None)
    return getattr(config, "num_virtual_tokens", None) or 0


def readable_length(model: Any) -> int | None:
    """Longest row that `model` can read, its virtual tokens taken off; None without a limit."""
    context = context_length(model.config)
    return None if context is None else context - virtual_tokens(model)


def check_row_lengths(
    rows: Dataset, model: Any, tokenizer: Any, max_length: int | None, where: str
) -> int:
    """`check_lengths` of converted rows against `model`, whose embeddings must do for their tokens.

    Raises:
        DataError: as `check_lengths`; or a row uses a token that the model has no embedding for.
    """
    check_tokens(rows, model, tokenizer, token_ids)
    return check_lengths(
        token_lengths(rows, tokenizer),
        max_length=max_length,
        context=context_length(model.config),
        virtual_tokens=virtual_tokens(model),
        where=where,
        name_row=partial(row_name, rows),
    )


def check_lengths(
    lengths: Sequence[int],
    *,
    max_length: int | None,
    context: int | None,
    virtual_tokens: int = 0,
    where: str = "rows",
    name_row: Callable[[int], str] = UNKNOWN.row,
) -> int:
    """Number of rows that `max_length` truncates; logs it when there are any.

    `max_length` is None unless the user set it. `virtual_tokens` of prompt learning take their
    share of the context.

    Raises:
        DataError: `max_length` is above the context; or a row is, and no `max_length` was set.
    """
    room = None if context is None else context - virtual_tokens
    taken = f" minus {virtual_tokens} virtual tokens" if virtual_tokens else ""
    if context is not None and context <= virtual_tokens:
        raise DataError(
            f"--num_virtual_tokens: expected fewer than {context} (the model's context), received "
            f"{virtual_tokens}: no room is left for text. Fix: --num_virtual_tokens {context // 2}"
        )
    if max_length is not None:
        if max_length < 1 or (room is not None and max_length > room):
            limit = "at least 1" if max_length < 1 else f"at most {room} (the context{taken})"
            raise DataError(
                f"--max_length: expected {limit}, received {max_length}. "
                f"Fix: --max_length {room if room is not None else 512}"
            )
        longer = sum(length > max_length for length in lengths)
        if longer:
            log.warning("%d of %d %s are truncated to %d tokens (longest: %d)",
                        longer, len(lengths), where, max_length, max(lengths))  # fmt: skip
        return longer
    if room is None or not lengths or max(lengths) <= room:
        return 0
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    longer = sum(length > room for length in lengths)
    raise DataError(
        f"{where}: expected at most {room} tokens (the model's context{taken}), received "
        f"{lengths[longest]} in {name_row(longest)}; {longer} of {len(lengths)} rows are too long. "
        f"Fix: --max_length {room} truncates them, or drop the long rows."
    )


def _texts(batch: dict[str, list[str]], tokenizer: Any) -> list[str]:
    """Whole texts of a batch, closed the way SFTTrainer closes them."""
    if "prompt" in batch:
        ends = [_close(c, tokenizer) for c in batch["completion"]]
        return [p + c for p, c in zip(batch["prompt"], ends, strict=True)]
    if "labels" in batch:
        return batch["text"]
    return [_close(text, tokenizer) for text in batch["text"]]


def _close(text: str, tokenizer: Any) -> str:
    eos = tokenizer.eos_token or ""
    return text if text.endswith(eos) else text + eos
