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
from fedtune.data.columns import require_text
from fedtune.data.detect import plain_texts, requests, row_format
from fedtune.data.labels import find_label_names, label_column, labels_of
from fedtune.data.origin import Faults, bad_rows, derive, row_name
from fedtune.errors import ConfigError, DataError

__all__ = [
    "as_classification_rows",
    "as_label_prompt_rows",
    "as_language_rows",
    "instruction_prompt",
    "label_prompt",
]


def as_language_rows(rows: Dataset, data: DataArguments, tokenizer: Any) -> Dataset:
    """Rows for SFTTrainer: `text`, `prompt` and `completion`, or `messages` (see `detect`).

    Raises:
        ConfigError: `messages` and a tokenizer without a chat template.
        DataError: no format fits, or a cell is empty or of the wrong type.
    """
    convert = partial(_language_rows, data=data, tokenizer=tokenizer)
    return derive(rows, convert(rows), convert)


def _language_rows(rows: Dataset, data: DataArguments, tokenizer: Any) -> Dataset:
    form = row_format(rows.column_names, data)
    if form.kind == "text":
        return Dataset.from_dict({"text": require_text(rows, form.request)})
    if form.kind == "messages":
        _check_chat_template(tokenizer)
        _check_messages(rows)
        return rows.select_columns(["messages"])
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
            f"column `{column}`: expected one of {', '.join(names)}, received {bad.received} in "
            f"{bad.where}. Fix: correct what is named, or name all labels."
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


def _check_chat_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "column `messages`: expected a tokenizer with a chat template, received one without. "
            "Fix: use an instruct model, put chat_template.jinja beside the tokenizer, or use "
            "prompt/completion rows."
        )


def _check_messages(rows: Dataset) -> None:
    for i, turns in enumerate(rows["messages"]):
        good = isinstance(turns, list) and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in turns
        )
        if not good or not turns:
            raise DataError(
                "column `messages`: expected a list of {role, content} with text in both, "
                f"received {str(turns)[:60]!r} in {row_name(rows, i)}. "
                "Fix: correct or remove the row."
            )
