"""Raw rows to what each trainer takes; all other columns are dropped, so partition first.

No end-of-text token is added here: trl's SFTTrainer adds one to `text` and `completion` that lack
it, and its default loss covers the completion only where there is a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data.chat import BESIDE_TURNS, as_chat_rows, is_chat
from fedtune.data.columns import require_text
from fedtune.data.detect import plain_texts, requests, row_format
from fedtune.data.labels import find_label_names, label_column, labels_of
from fedtune.data.origin import Faults, bad_rows, derive
from fedtune.data.template import find_template
from fedtune.data.text import say_once
from fedtune.errors import DataError, private

__all__ = [
    "as_classification_rows",
    "as_label_prompt_rows",
    "as_language_rows",
    "instruction_prompt",
    "label_prompt",
]


def as_language_rows(rows: Dataset, data: DataArguments, tokenizer: Any) -> Dataset:
    """Rows for SFTTrainer: `text`, `prompt` and `completion`, or `messages` (see `detect`, `chat`).

    Raises:
        ConfigError: conversations and a tokenizer without a chat template.
        DataError: no format fits, or a cell is empty or of the wrong type.
    """
    convert = partial(_language_rows, data=data, tokenizer=tokenizer)
    return derive(rows, convert(rows), convert)


def _language_rows(rows: Dataset, data: DataArguments, tokenizer: Any) -> Dataset:
    form = row_format(rows.column_names, data)
    if form.kind == "text":
        return Dataset.from_dict({"text": require_text(rows, form.request)})
    if is_chat(rows, form):
        find_template(tokenizer)
        return as_chat_rows(rows, form)
    _say_what_is_dropped(rows)
    if form.kind == "pair":
        prompts = require_text(rows, form.request)
    else:
        prompts = [instruction_prompt(asked, given) for asked, given in requests(rows, form)]
    return _pairs(prompts, require_text(rows, form.answer, blank_allowed=True))


def as_label_prompt_rows(rows: Dataset, data: DataArguments) -> Dataset:
    """Text and label as a question and its answer: `label_prompt(text)` and `" positive"`.

    The text is `--text_column`, else `text`, else (instruction rows) the input or, where that is
    empty, the instruction.

    Raises:
        DataError: no text or no label column, or an empty cell.
    """
    convert = partial(_label_prompt_rows, data=data)
    return derive(rows, convert(rows), convert)


def _label_prompt_rows(rows: Dataset, data: DataArguments) -> Dataset:
    labels = labels_of(rows, data)
    prompts = [label_prompt(text) for text in plain_texts(rows, data)]
    return _pairs(prompts, [f" {label}" for label in labels])


def as_classification_rows(
    rows: Dataset, data: DataArguments, label_names: Sequence[str] | None = None
) -> tuple[Dataset, list[str]]:
    """`text` and integer `labels`, and the name of each label.

    Give every client the same `label_names` (`find_label_names` of all rows), since a client may
    lack a class. Without them they come from these rows.

    Raises:
        DataError: no text or no label column, an empty cell, or a label that has no name.
    """
    names = find_label_names(rows, data) if label_names is None else list(label_names)
    convert = partial(_classification_rows, data=data, names=names)
    return derive(rows, convert(rows), convert), names


def _classification_rows(rows: Dataset, data: DataArguments, names: list[str]) -> Dataset:
    column = label_column(rows, data)
    ids = {name: i for i, name in enumerate(names)}

    def unknown(some: Dataset) -> Faults:
        labels = enumerate(labels_of(some, data))
        return [(i, repr(label)) for i, label in labels if label not in ids]

    bad = bad_rows(rows, unknown)
    if bad is not None:
        raise DataError(
            f"column `{column}`: expected one of {private(', '.join(names))}, received "
            f"{private(bad.received)} in {bad.where}. Fix: correct what is named, or name all "
            "labels."
        )
    labels = [ids[label] for label in labels_of(rows, data)]
    return Dataset.from_dict({"text": plain_texts(rows, data), "labels": labels})


def instruction_prompt(instruction: str, given: str = "") -> str:
    """The prompt of an instruction row; the answer follows on the next line."""
    material = f"### Input:\n{given}\n\n" if given.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{material}### Response:\n"


def label_prompt(text: str) -> str:
    """The prompt whose answer is a label, with a space before it."""
    return f"Text: {text}\nSentiment:"


def _pairs(prompts: list[str], completions: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def _say_what_is_dropped(rows: Dataset) -> None:
    dropped = [name for name in BESIDE_TURNS if name in rows.column_names]
    if dropped:
        say_once(
            f"columns {', '.join(dropped)}: left out: rows without turns go through no "
            "chat template."
        )
