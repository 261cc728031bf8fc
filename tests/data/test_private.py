"""What an error says of a row's content stays at its site; the row's number may leave."""

from __future__ import annotations

import pytest
from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data import as_classification_rows, as_language_rows, find_label_names
from fedtune.data.origin import mark
from fedtune.data.row_files import read_file
from fedtune.data.template import chat_texts
from fedtune.errors import DataError
from tests.data.conftest import CHAT_TEMPLATE, make_tokenizer

PLAIN = DataArguments()
JANE = "Jane Roe C50.9"


def language(**columns):
    return as_language_rows(
        mark(Dataset.from_dict(columns), "rows.jsonl"), PLAIN, make_tokenizer(CHAT_TEMPLATE)
    )


def labels(labels, names=None):
    rows = mark(Dataset.from_dict({"text": ["t"] * len(labels), "label": labels}), "rows.jsonl")
    return as_classification_rows(rows, PLAIN, names) if names else find_label_names(rows, PLAIN)


class Refusing:
    """A tokenizer whose template says what it does not like."""

    def apply_chat_template(self, turns, **_):
        raise ValueError(f"cannot write {turns[0]['content']}")


def refused_template():
    turns = [{"role": "user", "content": JANE}, {"role": "assistant", "content": "ok"}]
    rows = mark(Dataset.from_list([{"messages": turns}]), "rows.jsonl")
    chat_texts(rows, Refusing())


def file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    rows = read_file(tmp_path / name, "--train_file")
    as_language_rows(rows, PLAIN, make_tokenizer(CHAT_TEMPLATE))


CASES = {
    "a turn that is text": (
        lambda t: language(messages=[[JANE]]),
        "received … as turn 1 in row 1 of rows.jsonl",
    ),
    "a role": (
        lambda t: language(messages=[[{"role": JANE, "content": "x"}]]),
        "the role … of turn 1 in row 1",
    ),
    "one label": (lambda t: labels([JANE] * 60), "in all 60 rows"),
    "labels of one row each": (
        lambda t: labels([f"{JANE} {i}" for i in range(20)]),
        "20 labels in 20 rows",
    ),
    "an unknown label": (
        lambda t: labels(["a", JANE], names=["a", "b"]),
        "expected one of …, received … in row 2 of rows.jsonl",
    ),
    "known labels": (lambda t: labels(["x"], names=[JANE, "b"]), "expected one of …"),
    "a template": (lambda t: refused_template(), "refuses row 1 of rows.jsonl"),
    "no header": (lambda t: file(t, "rows.csv", f"{JANE},1\nx,2\n"), "received …. Fix: rename"),
    "a column twice": (lambda t: file(t, "rows.csv", f"{JANE},{JANE}\nx,2\n"), "header (line 1)"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_value_of_a_row_leaves_with_an_error(tmp_path, case):
    act, told = CASES[case]
    with pytest.raises(DataError) as caught:
        act(tmp_path)
    assert JANE[:8] in str(caught.value)
    assert JANE[:8] not in caught.value.outside
    assert told in caught.value.outside
    assert len(str(caught.value).splitlines()) == 1


def test_fractions_stay_and_their_rows_are_named():
    with pytest.raises(DataError) as caught:
        labels([0.5, 71.25])
    assert "fraction … in row 1 of rows.jsonl" in caught.value.outside
