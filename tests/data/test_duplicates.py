"""Equal rows against a count of our own over the rows themselves."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data import make_silos
from fedtune.data.duplicates import count_duplicates, drop_duplicates, row_keys
from fedtune.errors import DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def repeated(tmp_path):
    """Thirty rows, each there four times under another id and owner."""
    rows = [
        {
            "id": copy * 100 + i,
            "instruction": f"Say {i}.",
            "output": f"{i}",
            "site": "ab"[(copy + i) % 2],
        }
        for copy in range(4)
        for i in range(30)
    ]
    return write(tmp_path / "rows.jsonl", rows)


def silos_of(file, **flags):
    data = DataArguments(train_file=file, partition="column", partition_column="site", **flags)
    return make_silos(data, num_clients=2, min_rows=1, data_seed=5)


def test_held_out_rows_that_are_trained_on_are_counted(repeated):
    silos = silos_of(repeated)
    held_out = silos.evaluation["instruction"][:]
    own = [rows["instruction"][:] for rows in silos.train]
    found = silos.duplicates
    assert found.held_out == sum(text in own[0] + own[1] for text in held_out) > 0
    assert found.held_out_rows == len(held_out)
    for rows, counts in zip(own, found.clients.values(), strict=True):
        assert counts.held_out == sum(text in rows for text in held_out)
        assert counts.repeated == len(rows) - len(set(rows)) > 0
    assert found.shared == len(set(own[0]) & set(own[1])) > 0
    assert found.held_out_repeated == len(held_out) - len(set(held_out))
    first = next(said for said in found.sentences() if "held-out rows are" in said)
    counts = found.clients
    assert first.startswith(
        f"{found.held_out} of 12 held-out rows are training rows too, duplicates "
        f"(client-0 {counts['client-0'].held_out}, client-1 {counts['client-1'].held_out})"
    )
    assert all("duplicate" in said for said in found.sentences())


def test_deduplicate_leaves_each_row_once_and_on_one_side(repeated):
    silos = silos_of(repeated, deduplicate=True)
    held_out = set(silos.evaluation["instruction"])
    left = [text for rows in silos.train for text in rows["instruction"]]
    assert sorted(left) == sorted({f"Say {i}." for i in range(30)} - held_out)
    found = silos.duplicates
    assert (found.held_out, found.shared) == (0, 0)
    assert not any(own.repeated for own in found.clients.values())
    assert sum(found.removed.values()) == 108 - len(left)
    assert "duplicates taken out of training" in found.sentences()[0]


def test_an_eval_file_is_compared_too(tmp_path):
    train = write(tmp_path / "t.jsonl", [{"text": f"t{i}"} for i in range(9)])
    held_out = write(tmp_path / "e.jsonl", [{"text": " t3\n"}, {"text": "new"}])
    flags = {"train_file": train, "eval_file": held_out}
    silos = make_silos(DataArguments(**flags), num_clients=1, min_rows=1, data_seed=1)
    assert silos.duplicates.held_out == 1
    silos = make_silos(
        DataArguments(**flags, deduplicate=True), num_clients=1, min_rows=1, data_seed=1
    )
    assert "t3" not in silos.train[0]["text"][:]
    with pytest.raises(DataError, match=r"--deduplicate: expected .* all 9 are duplicates. Fix: "):
        make_silos(
            DataArguments(train_file=train, eval_file=train, deduplicate=True),
            num_clients=1,
            min_rows=1,
            data_seed=1,
        )


def test_distinct_rows_say_nothing(tmp_path):
    train = write(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": "x"} for i in range(20)])
    silos = make_silos(DataArguments(train_file=train), num_clients=2, min_rows=1, data_seed=1)
    assert silos.duplicates.sentences() == []


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a ", "completion": "b"}, True),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "B"}, False),
        ({"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "b c"}, False),
        ({"text": "a", "site": "x"}, {"text": "a", "site": "y"}, True),
        ({"body": "a", "row_id": 1}, {"body": "a", "row_id": 2}, True),
        ({"body": "a", "extra": 1}, {"body": "a", "extra": 2}, False),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            {"messages": [{"content": "hi ", "role": "user"}]},
            True,
        ),
    ],
)
def test_what_makes_rows_equal(one, other, equal):
    keys = [row_keys(Dataset.from_list([row]), DataArguments())[0] for row in (one, other)]
    assert (keys[0] == keys[1]) == equal


def test_texts_go_with_their_label():
    rows = Dataset.from_dict({"text": ["a", "a"], "label": [0, 1]})
    assert len(set(row_keys(rows, DataArguments(), "label"))) == 2
    assert len(set(row_keys(rows, DataArguments()))) == 1


def test_dropping_keeps_the_first_and_the_order():
    kept, removed = drop_duplicates([b"a", b"h", b"b", b"a", b"c"], [b"h"])
    assert kept == [0, 2, 4]
    assert removed == {"held-out rows": 1, "repeated rows": 1}
    assert count_duplicates({"x": [b"a"]}, [b"b"]).sentences() == []
