"""Conversations of every spelling, and each that is none."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data import as_language_rows, load_rows, token_lengths
from fedtune.errors import DataError
from tests.data.conftest import make_tokenizer

ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"type": "function", "function": {"name": "ward", "arguments": {"number": 3}}}
TOOL = {"type": "function", "function": {"name": "ward", "parameters": {"number": "int"}}}


def converted(raw, tokenizer, **flags):
    return as_language_rows(Dataset.from_list(raw), DataArguments(**flags), tokenizer).to_list()


def from_file(tmp_path, raw, tokenizer):
    """Rows of a jsonl file, whose objects may differ in their keys."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in raw))
    data = DataArguments(train_file=str(path))
    return as_language_rows(load_rows(data), data, tokenizer)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"from": "human", "value": "a"}, {"role": "user", "content": "a"}),
        ({"from": "gpt", "value": "a"}, {"role": "assistant", "content": "a"}),
        ({"from": "system", "value": "a"}, {"role": "system", "content": "a"}),
        ({"from": "function_call", "value": "a"}, {"role": "assistant", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"from": "tool", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "function", "content": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "user", "content": 5}, {"role": "user", "content": "5"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            {"role": "user", "content": "ab"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "ward", "arguments": '{"number": 3}'}}],
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "ward", "arguments": {"number": 3}}}],
            },
        ),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_turn(column, turn, expected, chat_tokenizer):
    assert converted([{column: [turn]}], chat_tokenizer) == [{"messages": [expected]}]


def test_conversations_as_json_text_and_their_system_column(chat_tokenizer):
    raw = [{"conversations": json.dumps([ASKED, SAID]), "system": "Be brief."}]
    system = {"role": "system", "content": "Be brief."}
    assert converted(raw, chat_tokenizer) == [{"messages": [system, ASKED, SAID]}]


def test_prompt_and_completion_of_turns_stay_such(chat_tokenizer):
    raw = [{"prompt": [ASKED], "completion": [SAID], "id": 1}]
    assert converted(raw, chat_tokenizer) == [{"prompt": [ASKED], "completion": [SAID]}]


def test_tools_are_kept_as_the_file_has_them(tmp_path, chat_tokenizer):
    """No key of one row's arguments appears in another's, and a null that is there stays."""
    other = {"function": {"name": "bed", "arguments": {"side": None, "floor": "x"}}}
    raw = [
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [other]}]},
        {"messages": [ASKED, SAID], "tools": json.dumps([TOOL]), "chat_template_kwargs": {"x": 1}},
    ]
    rows = from_file(tmp_path, raw, chat_tokenizer).to_list()
    assert [row["messages"][1].get("tool_calls") for row in rows] == [[CALL], [other], None]
    assert [row["tools"] for row in rows] == [[TOOL], None, [TOOL]]
    assert [row["chat_template_kwargs"] for row in rows] == [{}, {}, {"x": 1}]


def test_nulls_that_a_columnar_file_fills_in_are_no_keys(chat_tokenizer):
    other = {"type": "function", "function": {"name": "bed", "arguments": {"side": "left"}}}
    turns = [[ASKED, {**SAID, "tool_calls": [call]}] for call in (CALL, other)]
    raw = Dataset.from_list([{"messages": some, "tools": [TOOL]} for some in turns])
    assert "side" in raw[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    rows = as_language_rows(raw, DataArguments(), chat_tokenizer)
    assert [row["messages"] for row in rows] == turns


@pytest.mark.parametrize(
    ("row", "received"),
    [
        ({"messages": [{"role": "narrator", "content": "a"}]}, "the role 'narrator' of turn 1"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "no content in turn 2"),
        ({"messages": [{"content": "a"}]}, "the role null of turn 1"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "the content {'a': 1} in turn 1"),
        ({"conversations": []}, "a conversation without a turn"),
        ({"conversations": "hello"}, "'hello'"),
        ({"messages": ["hello"]}, "'hello' as turn 1"),
        ({"prompt": [ASKED], "completion": "ho"}, "'ho'"),
        ({"messages": [ASKED, SAID], "tools": "ward"}, "'ward'"),
        ({"messages": [ASKED, SAID], "chat_template_kwargs": "[1]"}, "'[1]'"),
        ({"messages": [ASKED, {**SAID, "tool_calls": "ward"}]}, "the tool_calls 'ward' of turn 2"),
    ],
)
def test_what_is_no_conversation_is_refused_by_row(row, received, tmp_path, chat_tokenizer):
    good = {"messages": [ASKED, SAID], "conversations": [ASKED, SAID], "prompt": [ASKED]}
    good = {name: good.get(name, [SAID]) for name in row if name != "chat_template_kwargs"}
    good |= {"tools": [TOOL]} if "tools" in row else {}
    with pytest.raises(DataError) as caught:
        from_file(tmp_path, [good, row], chat_tokenizer)
    assert f"received {received} in row 2 (line 2 of rows.jsonl)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses row 1 .*roles must alternate"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "expected a system turn first, .* in row 1 ",
        ),
    ],
)
def test_what_the_template_cannot_write_is_refused_by_row(template, message):
    tokenizer = make_tokenizer(template)
    rows = as_language_rows(
        Dataset.from_list([{"messages": [ASKED, {"role": "system", "content": "Stop."}, SAID]}]),
        DataArguments(),
        tokenizer,
    )
    with pytest.raises(DataError, match=message):
        token_lengths(rows, tokenizer)
