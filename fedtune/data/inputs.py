"""What a recipe gives its Trainer beside the model: settings that suit the rows, and the rows.

Both functions leave on the settings, as `rows_given`, what became of the rows: `usage` reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset

from fedtune.config import Arguments
from fedtune.data.chat import turns_of
from fedtune.data.embeddings import check_tokens
from fedtune.data.lengths import (
    check_lengths,
    context_length,
    length_limit,
    token_ids,
    token_lengths,
    virtual_tokens,
)
from fedtune.data.origin import row_name, select
from fedtune.data.template import find_template, leaves_out, marking_template
from fedtune.data.usage import Given
from fedtune.errors import ConfigError, DataError

__all__ = ["sft_inputs", "text_inputs"]

SETS = {"train": "training rows", "eval": "held-out rows"}


def sft_inputs(
    convert: Callable[[Dataset], Dataset],
    args: Arguments,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    evaluation: Dataset | None,
) -> dict[str, Any]:
    """`args`, `train_dataset` and `eval_dataset` of an SFTTrainer, as keyword arguments.

    `convert` makes rows that it takes (`as_language_rows`, ...) of a client's. The settings are a
    copy of `args.training`: conversations are learned on assistant turns only where the chat
    template marks them (unless `--assistant_only_loss` says otherwise), and rows longer than the
    model can read are cut (with `--strict_length` they are refused).

    Raises:
        ConfigError: conversations without a chat template, or a loss that it cannot mark.
        DataError: a row that the template refuses, a row too long, or no row with an answer.
    """
    training = copy.copy(args.training)
    sets = _converted(convert, train, evaluation)
    given = {name: Given() for name in sets}
    only, template = False, None
    if turns_of(sets["train"][0]) is not None:
        own = find_template(tokenizer, getattr(training, "chat_template_path", None))
        marking = marking_template(tokenizer, own)
        only = _assistant_only(training.assistant_only_loss, marking)
        template = marking if only else own
        every = not only and training.assistant_only_loss is None
        for name, rows in sets.items():
            notes = leaves_out(rows, tokenizer, template)
            sets[name], without = _with_answer(rows, SETS[name]) if only else (rows, 0)
            given[name] = Given(without_answer=without, every_turn=every, unwritten=tuple(notes))
    elif training.assistant_only_loss:
        raise ConfigError(
            "--assistant_only_loss true: expected conversations, received rows without turns. "
            "Fix: leave it out."
        )
    training.assistant_only_loss = only
    for rows in sets.values():
        check_tokens(rows, model, tokenizer, partial(token_ids, template=template))
    lengths = {name: token_lengths(rows, tokenizer, template) for name, rows in sets.items()}
    packed = getattr(training, "packing", False)
    limit = length_limit(training.max_length, context_length(model.config), virtual_tokens(model))
    longest = max(max(each) for each in lengths.values())
    strict = args.data.strict_length or (training.padding_free and not packed)
    for name, rows in sets.items():
        if not packed or training.packing_strategy == "bfd":  # the others split rows
            given[name] = _cut(given[name], rows, lengths[name], training, model, name, strict)
    if training.max_length is None and limit is not None and (packed or longest > limit):
        training.max_length = limit
    return _inputs(training, sets, given)


def text_inputs(
    convert: Callable[[Dataset], Dataset],
    args: Arguments,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    evaluation: Dataset | None,
) -> dict[str, Any]:
    """`args`, `train_dataset` and `eval_dataset` of a Trainer over texts and their labels.

    `convert` makes rows with `text` and `labels` of a client's. Texts are tokenized, and cut at
    what the model can read (with `--strict_length` they are refused).

    Raises:
        DataError: a text too long.
    """
    training = copy.copy(args.training)
    sets = _converted(convert, train, evaluation)
    room = length_limit(None, context_length(model.config), virtual_tokens(model))
    given = {}
    for name, rows in sets.items():
        check_tokens(rows, model, tokenizer, token_ids)
        lengths, strict = token_lengths(rows, tokenizer), args.data.strict_length
        given[name] = _cut(Given(), rows, lengths, training, model, name, strict)
        sets[name] = rows.map(
            lambda batch: tokenizer(batch["text"], truncation=room is not None, max_length=room),
            batched=True,
            remove_columns="text",
        )
    return _inputs(training, sets, given)


def _converted(
    convert: Callable[[Dataset], Dataset], train: Dataset, evaluation: Dataset | None
) -> dict[str, Dataset]:
    held_out = {} if evaluation is None else {"eval": convert(evaluation)}
    return {"train": convert(train), **held_out}


def _inputs(training: Any, sets: dict[str, Dataset], given: dict[str, Given]) -> dict[str, Any]:
    training.rows_given = given
    return {"args": training, "train_dataset": sets["train"], "eval_dataset": sets.get("eval")}


def _assistant_only(asked: bool | None, marking: str | None) -> bool:
    if asked and marking is None:
        raise ConfigError(
            "--assistant_only_loss true: expected a chat template that marks assistant turns, "
            "received one without {% generation %}. Fix: mark them there, or leave it out."
        )
    return marking is not None if asked is None else asked


def _with_answer(rows: Dataset, where: str) -> tuple[Dataset, int]:
    """Rows with an assistant turn to learn from, and how many have none."""
    kept = [i for i, row in enumerate(rows) if _answers(row)]
    if not kept:
        raise DataError(
            f"{where}: expected assistant turns to learn from, received {len(rows)} conversations "
            "without one. Fix: correct the roles, or --assistant_only_loss false."
        )
    return (rows, 0) if len(kept) == len(rows) else (select(rows, kept), len(rows) - len(kept))


def _answers(row: dict[str, Any]) -> bool:
    turns = row["messages"] if "messages" in row else row["completion"]
    return any(turn["role"] == "assistant" for turn in turns)


def _cut(
    given: Given,
    rows: Dataset,
    lengths: list[int],
    training: Any,
    model: Any,
    name: str,
    strict: bool,
) -> Given:
    max_length, virtual = getattr(training, "max_length", None), virtual_tokens(model)
    context = context_length(model.config)
    cut = check_lengths(
        lengths,
        max_length=max_length,
        context=context,
        virtual_tokens=virtual,
        where=SETS[name],
        strict=strict,
        name_row=partial(row_name, rows),
    )
    limit = length_limit(max_length, context, virtual)
    words = "--max_length" if max_length is not None else "the model's context"
    return replace(given, cut=cut, longest=max(lengths), limit=limit, limit_name=words)
