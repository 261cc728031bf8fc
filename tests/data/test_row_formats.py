"""Rows as the trainers take them, and every row that cannot be one."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedtune.config import DataArguments
from fedtune.data import (
    as_classification_rows,
    as_label_prompt_rows,
    as_language_rows,
    find_label_names,
    load_rows,
    row_format,
)
from fedtune.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PLAIN = DataArguments()


def rows(**columns):
    return Dataset.from_dict(columns, on_mixed_types="use_json")


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages", "text", "label"], "messages"),
        (["instruction", "input", "output", "silo", "label"], "instruction"),
        (["conversations", "id"], "messages"),
        (["instruction", "output", "text"], "instruction"),
        (["instruction", "context", "response", "category"], "instruction"),
        (["question", "answer"], "instruction"),
        (["prompt", "completion"], "pair"),
        (["text", "label", "agreement"], "text"),
        (["sentence", "label"], "text"),
    ],
)
def test_format_is_found_by_name(columns, kind):
    assert row_format(columns, PLAIN).kind == kind


def test_text_column_wins_over_every_name():
    form = row_format(
        ["messages", "instruction", "output", "body"], DataArguments(text_column="body")
    )
    assert form[:2] == ("text", "body")


def test_instruction_rows_become_prompt_and_completion(tokenizer):
    raw = rows(
        instruction=["Add.", "Greet."], input=["1 2", ""], output=["3", "Hi"], silo=["a", "b"]
    )
    assert as_language_rows(raw, PLAIN, tokenizer).to_list() == [
        {
            "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
            "completion": "3",
        },
        {"prompt": "### Instruction:\nGreet.\n\n### Response:\n", "completion": "Hi"},
    ]


def test_prompt_completion_rows_are_untouched(tokenizer):
    raw = rows(prompt=["a", "b"], completion=[" c", ""], extra=[1, 2])
    assert as_language_rows(raw, PLAIN, tokenizer).to_list() == [
        {"prompt": "a", "completion": " c"},
        {"prompt": "b", "completion": ""},
    ]


def test_text_rows_ignore_their_label(tokenizer):
    raw = rows(text=["a", "b"], label=["x", None])
    data = DataArguments(text_column="text")
    assert as_language_rows(raw, data, tokenizer).to_list() == [{"text": "a"}, {"text": "b"}]


def test_messages_stay_for_the_chat_template(tokenizer, chat_tokenizer):
    raw = rows(messages=[CHAT], silo=["a"])
    assert as_language_rows(raw, PLAIN, chat_tokenizer).to_list() == [{"messages": CHAT}]
    with pytest.raises(ConfigError, match=r"expected a tokenizer with a chat template.* Fix: "):
        as_language_rows(raw, PLAIN, tokenizer)


def test_conversion_leaves_the_raw_rows_alone(tokenizer):
    raw = rows(question=["a"], answer=["b"])
    as_language_rows(raw, PLAIN, tokenizer)
    assert raw.to_list() == [{"question": "a", "answer": "b"}]


def test_label_prompts():
    raw = rows(text=["Profit rose.", "Flat."], label=["positive", "neutral"])
    assert as_label_prompt_rows(raw, PLAIN).to_list() == [
        {"prompt": "Text: Profit rose.\nSentiment:", "completion": " positive"},
        {"prompt": "Text: Flat.\nSentiment:", "completion": " neutral"},
    ]


def test_label_prompts_of_instruction_rows_use_the_input():
    raw = rows(
        instruction=["Route.", "Help!"],
        input=["I am upset.", ""],
        output=["x", "y"],
        label=["negative", "neutral"],
    )
    texts = [row["prompt"].splitlines()[0] for row in as_label_prompt_rows(raw, PLAIN)]
    assert texts == ["Text: I am upset.", "Text: Help!"]


def test_classification_rows_share_label_names():
    raw = rows(text=["a", "b", "c"], label=["pos", "neg", "pos"])
    converted, names = as_classification_rows(raw, PLAIN)
    assert names == ["neg", "pos"]
    assert converted.to_list()[0] == {"text": "a", "labels": 1}
    # a client without a class keeps the numbers of the others
    alone, names = as_classification_rows(raw.select([0]), PLAIN, ["neg", "neutral", "pos"])
    assert (alone["labels"][:], names) == ([2], ["neg", "neutral", "pos"])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2], ["2", "9", "10"]),
        (["b", "a", "b"], ["a", "b"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_label_names_are_sorted(labels, names):
    assert find_label_names(rows(text=["x"] * len(labels), label=labels), PLAIN) == names


def test_class_label_features_keep_their_names():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["World", "Sports"])})
    raw = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    converted, names = as_classification_rows(raw, PLAIN)
    assert names == ["World", "Sports"]
    assert converted["labels"][:] == [1, 0]
    assert as_label_prompt_rows(raw, PLAIN)["completion"][:] == [" Sports", " World"]


@pytest.mark.parametrize(
    ("columns", "flags", "message"),
    [
        (
            {"body": ["a"]},
            {},
            "received 'body'. Fix: rename them, or name the text with --text_column",
        ),
        (
            {"text": ["a"]},
            {"text_column": "txt"},
            "--text_column: expected a column of the data ('text'), received 'txt'. "
            "Fix: did you mean --text_column text?",
        ),
        (
            {"text": ["a", None]},
            {},
            "column `text`: expected text, received null in row 2",
        ),
        (
            {"text": ["a", " \n"]},
            {},
            "column `text`: expected text, received an empty cell in row 2",
        ),
        (
            {"text": [[1], "a", {"b": 1}]},
            {},
            "column `text`: expected text, received a list in row 1 (rows count from 1) and 1 more "
            "row. Fix",
        ),
        (
            {"prompt": ["a"], "completion": [["b"]]},
            {},
            "column `completion`: expected text, received a list in row 1",
        ),
        (
            {"question": [""], "answer": ["b"]},
            {},
            "column `question`: expected text, received an empty cell",
        ),
        (
            {"instruction": ["a"], "output": [None]},
            {},
            "column `output`: expected text, received null",
        ),
        (
            {"messages": [[]]},
            {},
            "expected a list of {role, content}, received a conversation without a turn in row 1",
        ),
        ({"messages": [[{"from": "a", "value": "b"}]]}, {}, "received the role 'a' of turn 1"),
        ({"messages": ["hello"]}, {}, "received 'hello' in row 1"),
    ],
)
def test_bad_language_rows_are_refused_in_one_line(columns, flags, message, chat_tokenizer):
    with pytest.raises(DataError) as caught:
        as_language_rows(rows(**columns), DataArguments(**flags), chat_tokenizer)
    assert message in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "flags", "message"),
    [
        (
            {"text": ["a"]},
            {},
            "expected a label, received 'text'. Fix: name it with --label_column",
        ),
        (
            {"text": ["a"], "label": ["x"]},
            {"label_column": "labl"},
            "did you mean --label_column label?",
        ),
        (
            {"label": ["x", "y"], "body": ["a", "b"]},
            {},
            "Fix: rename them, or name the text with --text_column",
        ),
        (
            {"text": ["a"], "label": [None]},
            {},
            "column `label`: expected names or whole numbers, received null",
        ),
        (
            {"text": ["a"], "label": [0.5]},
            {},
            "expected names or whole numbers, received the fraction 0.5 in row 1",
        ),
        (
            {"text": ["", "b"], "label": ["x", "y"]},
            {},
            "column `text`: expected text, received an empty cell",
        ),
        ({"messages": [CHAT, CHAT], "label": ["x", "y"]}, {}, "expected a text to classify"),
    ],
)
@pytest.mark.parametrize("convert", [as_label_prompt_rows, as_classification_rows])
def test_bad_labelled_rows_are_refused_in_one_line(convert, columns, flags, message):
    with pytest.raises(DataError) as caught:
        convert(rows(**columns), DataArguments(**flags))
    assert message in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_without_a_name_is_refused():
    raw = rows(text=["a", "b"], label=["pos", "meh"])
    with pytest.raises(DataError, match="expected one of neg, pos, received 'meh' in row 2"):
        as_classification_rows(raw, PLAIN, ["neg", "pos"])


def test_real_alpaca_rows(real_data, tokenizer):
    raw = load_rows(DataArguments(train_file=real_data("alpaca_en.jsonl")))
    converted = as_language_rows(raw, PLAIN, tokenizer)
    assert converted.column_names == ["prompt", "completion"]
    assert converted["completion"][:] == raw["output"][:]
    with_input = ["### Input:" in prompt for prompt in converted["prompt"]]
    assert sum(with_input) == sum(bool(given) for given in raw["input"])


def test_real_phrasebank_is_text_or_labels(real_data, tokenizer):
    raw = load_rows(DataArguments(train_file=real_data("financial_phrasebank.jsonl"), max_rows=300))
    text = as_language_rows(raw, DataArguments(text_column="text"), tokenizer)
    assert text.column_names == ["text"]
    _, names = as_classification_rows(raw, PLAIN)
    assert names == ["negative", "neutral", "positive"]
