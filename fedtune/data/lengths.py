"""Tokens per row, against what the model can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from fedtune.data.chat import turns_of
from fedtune.data.embeddings import check_tokens
from fedtune.data.origin import UNKNOWN, row_name
from fedtune.data.template import chat_texts
from fedtune.errors import DataError

__all__ = [
    "check_lengths",
    "check_row_lengths",
    "context_length",
    "length_limit",
    "readable_length",
    "token_lengths",
    "virtual_tokens",
]

BATCH = 1_000
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def token_lengths(rows: Dataset, tokenizer: Any, template: str | None = None) -> list[int]:
    """Tokens of each converted row as SFTTrainer counts them before truncation, its EOS included.

    Classification rows (with `labels`) get no EOS. `template` is the chat template, where it is not
    the tokenizer's own.

    Raises:
        DataError: the chat template refuses a row.
    """
    return [len(ids) for ids in token_ids(rows, tokenizer, template)]


def token_ids(rows: Dataset, tokenizer: Any, template: str | None = None) -> Iterator[list[int]]:
    """Tokens of each converted row, as `token_lengths` counts them."""
    turns = len(rows) > 0 and turns_of(rows[0]) is not None
    texts = chat_texts(rows, tokenizer, template) if turns else []
    for start in range(0, len(rows), BATCH):
        end = start + BATCH
        batch = texts[start:end] if turns else _texts(rows[start:end], tokenizer)
        # not verbose: too long is this module's to judge, not a warning of the tokenizer
        yield from tokenizer(batch, add_special_tokens=not turns, verbose=False)["input_ids"]


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
    rows: Dataset,
    model: Any,
    tokenizer: Any,
    max_length: int | None,
    where: str,
    *,
    strict: bool = False,
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
        strict=strict,
        name_row=partial(row_name, rows),
    )


def check_lengths(
    lengths: Sequence[int],
    *,
    max_length: int | None,
    context: int | None,
    virtual_tokens: int = 0,
    where: str = "rows",
    strict: bool = False,
    name_row: Callable[[int], str] = UNKNOWN.row,
) -> int:
    """Number of rows that are longer than `max_length` or, where that is None, than the context.

    `virtual_tokens` of prompt learning take their share of the context.

    Raises:
        DataError: `max_length` is above the context; or, if `strict`, a row is too long.
    """
    room = length_limit(max_length, context, virtual_tokens)
    longer = 0 if room is None else sum(length > room for length in lengths)
    if not (longer and strict):
        return longer
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    taken = f" minus {virtual_tokens} virtual tokens" if virtual_tokens else ""
    limit = "--max_length" if max_length is not None else f"the model's context{taken}"
    raise DataError(
        f"{where}: expected at most {room} tokens ({limit}), received {lengths[longest]} in "
        f"{name_row(longest)}; {longer} of {len(lengths)} rows are too long. "
        "Fix: shorten them, or leave out --strict_length, which cuts them."
    )


def length_limit(
    max_length: int | None, context: int | None, virtual_tokens: int = 0
) -> int | None:
    """Most tokens of a row: `max_length`, else what the context has room for; None: no limit.

    Raises:
        DataError: `max_length` is below 1 or above the room; or there is no room.
    """
    room = None if context is None else context - virtual_tokens
    if context is not None and context <= virtual_tokens:
        raise DataError(
            f"--num_virtual_tokens: expected fewer than {context} (the model's context), received "
            f"{virtual_tokens}: no room is left for text. Fix: --num_virtual_tokens {context // 2}"
        )
    if max_length is not None and (max_length < 1 or (room is not None and max_length > room)):
        taken = f" minus {virtual_tokens} virtual tokens" if virtual_tokens else ""
        limit = "at least 1" if max_length < 1 else f"at most {room} (the context{taken})"
        raise DataError(
            f"--max_length: expected {limit}, received {max_length}. "
            f"Fix: --max_length {room if room is not None else 512}"
        )
    return room if max_length is None else max_length


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
