"""A tokenizer's chat template: what it writes of a row, and whether it marks assistant turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedtune.data.chat import turns_of
from fedtune.data.origin import row_name
from fedtune.errors import ConfigError, DataError, private

__all__ = ["chat_texts", "find_template", "leaves_out", "marking_template"]

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def find_template(tokenizer: Any, path: str | None = None) -> str:
    """Template of `--chat_template_path`, where that is a file, else the tokenizer's default one.

    Raises:
        ConfigError: there is none.
    """
    if path is not None and Path(path).suffix in (".jinja", ".j2") and Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            "column `messages`: expected a tokenizer with a chat template, received one without. "
            "Fix: use an instruct model, put chat_template.jinja beside the tokenizer, or use "
            "prompt/completion rows."
        )
    return str(template)


def marking_template(tokenizer: Any, template: str) -> str | None:
    """The template that marks assistant turns: this one, or the one that trl knows for it."""
    if MARKS.search(template):
        return template
    if template != getattr(tokenizer, "chat_template", None):
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        known: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # trl's word for: no such template
        return None
    return known


def chat_texts(rows: Dataset, tokenizer: Any, template: str | None = None) -> list[str]:
    """What the template writes of each row, as SFTTrainer has it written.

    Raises:
        DataError: the template refuses a row, or leaves out a later system turn.
    """
    texts = []
    for i, row in enumerate(rows):
        turns = turns_of(row) or []
        try:
            text = _written(row, turns, tokenizer, template)
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"chat template: refuses {row_name(rows, i)} (turns: {_roles(turns)}): "
                f"{private(reason)}. Fix: correct or remove that row, or use another template."
            ) from error
        if any(turn["content"].strip() not in text for turn in turns[1:] if _system(turn)):
            raise DataError(
                f"chat template: expected a system turn first, received turns {_roles(turns)} in "
                f"{row_name(rows, i)}, of which it leaves out the later one. "
                "Fix: put what it says into the first turn."
            )
        texts.append(text)
    return texts


def leaves_out(rows: Dataset, tokenizer: Any, template: str | None) -> list[str]:
    """What the template writes nothing of, though rows have it: `tools`, `tool_calls`."""
    found = []
    for name in ("tools", "tool_calls"):
        row = next((row for row in rows if _has(row, name)), None)
        if row is not None and _same_without(row, name, tokenizer, template):
            found.append(name)
    return found


def _has(row: dict[str, Any], name: str) -> bool:
    return bool(row.get(name)) or any(turn.get(name) for turn in turns_of(row) or [])


def _same_without(row: dict[str, Any], name: str, tokenizer: Any, template: str | None) -> bool:
    turns = turns_of(row) or []
    without = [{key: value for key, value in turn.items() if key != name} for turn in turns]
    bare = {key: value for key, value in row.items() if key != name}
    try:
        bare_text = _written(bare, without, tokenizer, template)
    except Exception:  # it needs what was taken out, so it writes it
        return False
    return bare_text == _written(row, turns, tokenizer, template)


def _written(
    row: dict[str, Any], turns: Sequence[dict[str, Any]], tokenizer: Any, template: str | None
) -> str:
    text: str = tokenizer.apply_chat_template(
        turns,
        tokenize=False,
        tools=row.get("tools"),
        chat_template=template,
        **(row.get("chat_template_kwargs") or {}),
    )
    return text


def _system(turn: dict[str, Any]) -> bool:
    return turn["role"] in ("system", "developer")


def _roles(turns: Sequence[dict[str, Any]]) -> str:
    return ", ".join(turn["role"] for turn in turns[:8]) + (", ..." if len(turns) > 8 else "")
