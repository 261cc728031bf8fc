"""Conversations of any spelling, as chat templates take them: lists of `{role, content}`.

| what is found | what becomes of it |
|---|---|
| `role` and `content`, or sharegpt's `from` and `value` | `role` and `content` |
| human, gpt, function_call, observation and other names | user, assistant, assistant, tool |
| content as a list of `{type: text, text}` | its texts, joined |
| no content beside tool calls | the empty text |
| tool calls, their arguments, `tools`, the whole list as JSON text | what the text says |
| a column `system` beside `conversations` | the first turn, where there is no system turn |
| null where a turn has no such key (as columnar files fill them in) | no key |

Everything else that a turn holds stays. Objects keep their own keys: columns are stored as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, Json, List

from fedtune.data.columns import as_text
from fedtune.data.detect import RowFormat
from fedtune.data.origin import row_name
from fedtune.errors import DataError, private

__all__ = ["BESIDE_TURNS", "as_chat_rows", "is_chat", "turns_of"]

BESIDE_TURNS = ("tools", "chat_template_kwargs")  # what trl hands to the template with the turns
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}

Turns = list[dict[str, Any]]


class _Fault(Exception):
    """What is wrong with a cell, as the end of `received ...`, and what to do."""

    def __init__(self, received: str, fix: str = "correct or remove what is named") -> None:
        super().__init__(received)
        self.fix = fix


def is_chat(rows: Dataset, form: RowFormat) -> bool:
    """Whether rows of this format hold turns: `messages`, or lists as prompt and completion."""
    if form.kind == "pair":
        return any(isinstance(cell, list) for cell in rows[form.request])
    return form.kind == "messages"


def as_chat_rows(rows: Dataset, form: RowFormat) -> Dataset:
    """`messages`, or `prompt` and `completion`, with `tools` and `chat_template_kwargs`.

    Raises:
        DataError: a cell that is no conversation, or no tools.
    """
    cells: dict[str, list[Any]] = {}
    if form.kind == "messages":
        cells["messages"] = _column(rows, form.request, _turns, "a list of {role, content}")
        if form.request == "conversations" and "system" in rows.column_names:
            systems = map(as_text, rows["system"])
            cells["messages"] = list(map(_with_system, cells["messages"], systems))
    else:
        for name, column in (("prompt", form.request), ("completion", form.answer)):
            cells[name] = _column(rows, column, _turns, "a list of {role, content}")
    if "tools" in rows.column_names:
        cells["tools"] = _column(rows, "tools", _tools, "a list of functions, or its JSON text")
    if "chat_template_kwargs" in rows.column_names:
        cells["chat_template_kwargs"] = _column(
            rows, "chat_template_kwargs", _settings, "an object, or its JSON text"
        )
    features = {name: List(Json()) for name in cells}
    if "chat_template_kwargs" in cells:
        features["chat_template_kwargs"] = Json()
    return Dataset.from_dict(cells, features=Features(features))


def turns_of(row: dict[str, Any]) -> Turns | None:
    """All turns of a converted row; None where it holds none."""
    if "messages" in row:
        turns: Turns = row["messages"]
        return turns
    if isinstance(row.get("prompt"), list):
        pair: Turns = row["prompt"] + row["completion"]
        return pair
    return None


def _column(rows: Dataset, name: str, convert: Callable[[Any], Any], expected: str) -> list[Any]:
    # Columns of one type for all rows hold nulls where an object lacks a key.
    filled_in = "Json" not in str(rows.features[name])
    converted = []
    for i, cell in enumerate(rows[name]):
        try:
            converted.append(convert(_without_nulls(cell) if filled_in else cell))
        except _Fault as fault:
            raise DataError(
                f"column `{name}`: expected {expected}, received {fault} in {row_name(rows, i)}. "
                f"Fix: {fault.fix}."
            ) from None
    return converted


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _turns(cell: Any) -> Turns:
    turns = _parsed(cell)
    if not isinstance(turns, list):
        raise _Fault(_shown(cell))
    if not turns:
        raise _Fault("a conversation without a turn")
    return [_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise _Fault(f"{_shown(turn)} as turn {number}")
    named = turn.get("role", turn.get("from"))
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise _Fault(f"the role {_shown(named)} of turn {number}", f"use one of {known}")
    calls = _calls(turn.get("tool_calls"), number)
    content = turn.get("content", turn.get("value"))
    rest = {
        name: value
        for name, value in turn.items()
        if value is not None and name not in ("role", "from", "content", "value", "tool_calls")
    }
    text = _content(content, number, may_lack=bool(calls))
    return {"role": role, "content": text, **({"tool_calls": calls} if calls else {}), **rest}


def _content(content: Any, number: int, *, may_lack: bool) -> str:
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    if content is None or isinstance(content, dict | list | bytes):
        what = "no content" if content is None else f"the content {_shown(content)}"
        raise _Fault(f"{what} in turn {number}")
    return as_text(content)


def _calls(calls: Any, number: int) -> Turns:
    calls = _parsed(calls)
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _Fault(f"the tool_calls {_shown(calls)} of turn {number}")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object, as templates take them; OpenAI writes them as JSON text."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = _parsed(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _tools(cell: Any) -> list[dict[str, Any]] | None:
    tools = _parsed(cell)
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return None
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Fault(_shown(cell))
    return tools


def _settings(cell: Any) -> dict[str, Any]:
    settings = _parsed(cell) or {}
    if not isinstance(settings, dict):
        raise _Fault(_shown(cell))
    return settings


def _with_system(turns: Turns, system: str) -> Turns:
    if not system.strip() or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _parsed(cell: Any) -> Any:
    """What JSON text says; anything else as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell) if cell.strip() else None
    except ValueError:
        return cell


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return private(text if len(text) <= 60 else text[:57] + "...")
