"""Columns that are no labels are refused, and what makes a score mean nothing is said."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedtune.config import DataArguments
from fedtune.data import as_classification_rows, check_held_out_labels, find_label_names
from fedtune.data.load import hold_out
from fedtune.data.origin import mark
from fedtune.errors import DataError

PLAIN = DataArguments()


def labelled(labels, **features):
    return mark(Dataset.from_dict({"text": ["t"] * len(labels), "label": labels}, **features), "f")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["positive"] * 60, "expected at least two labels, received `positive` in all 60 rows"),
        ([1] * 5, "received `1` in all 5 rows"),
        ([f"id-{i}" for i in range(20)], "expected labels that rows share, received 20 labels in"),
        ([0.5, 1.5], "received the fraction 0.5 in row 1 of f and 1 more row"),
        (["0.5", "1.5", "2"], "received the fraction 0.5"),
        (["a", "b", None], "received null in row 3 of f"),
        (["a", " ", "b", ""], "received an empty cell in row 2 of f and 1 more row"),
    ],
)
def test_what_is_no_column_of_labels_is_refused(labels, message):
    with pytest.raises(DataError, match="column `label`: ") as caught:
        find_label_names(labelled(labels), PLAIN)
    assert message in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_one_class_of_a_declared_many_is_refused():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    with pytest.raises(DataError, match="received `good` in all 3 rows"):
        find_label_names(labelled([1, 1, 1], features=features), PLAIN)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0.0, 1.0], ["0", "1"]),
        (["0.0", "1.0"], ["0.0", "1.0"]),
        (["4.5", "good"], ["4.5", "good"]),
    ],
)
def test_whole_numbers_and_names_are_labels(labels, names):
    assert find_label_names(labelled(labels), PLAIN) == names


def test_fractions_that_are_whole_are_the_labels_of_their_rows():
    converted, names = as_classification_rows(labelled([1.0, 0.0]), PLAIN)
    assert (names, converted["labels"][:]) == (["0", "1"], [1, 0])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "b"] * 10, []),
        (
            ["Pos", "pos ", "neg"],
            ["'Pos', 'pos ' differ by case or spaces alone; they are taken"],
        ),
        ([f"id-{i // 2 if i < 8 else i}" for i in range(20)], ["16 labels in 20 rows"]),
    ],
)
def test_what_may_be_wrong_is_warned_of(labels, said, caplog):
    find_label_names(labelled(labels), PLAIN)
    assert len(caplog.messages) == len(said)
    assert all(text in line for text, line in zip(said, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("train", "held_out", "said"),
    [
        ("ab", "ab", []),
        ("ab", "aa", ["all 2 held-out rows have one label, 'a'"]),
        ("aab", "ac", ["'c' is in held-out rows only"]),
        ("ab", "cc", ["have one label, 'c'", "'c' is in held-out rows only"]),
    ],
)
@pytest.mark.parametrize("own_file", [True, False])
def test_held_out_labels(train, held_out, said, own_file, caplog):
    if own_file:
        evaluation, names = labelled(list(held_out)), sorted(set(train))
    else:
        _, evaluation = split(train, held_out)
        names = sorted(set(train + held_out))
    check_held_out_labels(evaluation, PLAIN, names)
    assert len(caplog.messages) == len(said)
    assert all(text in line for text, line in zip(said, caplog.messages, strict=True))


def split(train, held_out):
    """Rows of one file, of which a seed holds out just those with the labels `held_out`."""
    count = len(train) + len(held_out)
    fraction = len(held_out) / count
    _, chosen = hold_out(Dataset.from_dict({"i": list(range(count))}), fraction, data_seed=1)
    at = chosen["i"][:]
    own, others = iter(held_out), iter(train)
    rows = labelled([next(own) if i in at else next(others) for i in range(count)])
    return hold_out(rows, fraction, data_seed=1)
