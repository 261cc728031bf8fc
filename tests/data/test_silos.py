"""Silos of real and made-up data, and the table of who has what."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from datasets import concatenate_datasets

import fedtune.data
from fedtune.config import DataArguments
from fedtune.data import client_table, format_table, make_silos
from fedtune.errors import ConfigError, DataError


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": f"t{i}", "label": "pos" if i % 3 else "neg", "site": "abc"[i % 3]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["iid", "size", "dirichlet", "column"])
def test_every_row_is_in_one_silo_or_held_out(small, kind):
    data = DataArguments(train_file=small, partition=kind, partition_column="site")
    silos = make_silos(data, num_clients=3, min_rows=4, data_seed=5)
    assert silos.names == ["client-0", "client-1", "client-2"]
    assert [len(rows) for rows in silos.train] == [len(part) for part in silos.indices]
    everything = concatenate_datasets([*silos.train, silos.evaluation])["text"][:]
    assert sorted(everything) == sorted(f"t{i}" for i in range(60))
    assert sorted(i for part in silos.indices for i in part) == list(range(54))
    again = make_silos(data, num_clients=3, min_rows=4, data_seed=5)
    assert again.indices == silos.indices


def test_column_silos_say_what_they_own(small):
    data = DataArguments(train_file=small, partition="column", partition_column="site")
    silos = make_silos(data, num_clients=2, min_rows=1, data_seed=5)
    assert sorted(v for owned in silos.owned for v in owned) == ["a", "b", "c"]
    for rows, owned in zip(silos.train, silos.owned, strict=True):
        assert set(rows["site"]) == set(owned)


def test_dirichlet_takes_the_label_by_default(small):
    named = DataArguments(train_file=small, partition="dirichlet", partition_column="label")
    default = DataArguments(train_file=small, partition="dirichlet")
    one, two = (make_silos(d, num_clients=3, min_rows=1, data_seed=5) for d in (named, default))
    assert one.indices == two.indices


def test_single_class_clients_are_warned_of(small, caplog):
    data = DataArguments(
        train_file=small, partition="dirichlet", partition_column="site", partition_alpha=0.01
    )
    silos = make_silos(data, num_clients=3, min_rows=1, data_seed=1)
    alone = [len(set(rows["site"])) == 1 for rows in silos.train]
    assert any(alone)
    warned = [m for m in caplog.messages if "has a single class" in m]
    assert [m.split()[0] for m in warned] == [
        name for name, one in zip(silos.names, alone, strict=True) if one
    ]
    assert all("\n" not in m for m in warned)


def test_a_cell_that_is_not_needed_may_be_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": null}\n' * 5 + '{"text": "a", "label": 0.5}\n' * 5)
    data = DataArguments(train_file=str(path))
    silos = make_silos(data, num_clients=2, min_rows=1, data_seed=1)
    assert format_table(client_table(silos, None, "label"))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            {"partition": "column"},
            ConfigError,
            "--partition column: expected --partition_column, received none",
        ),
        (
            {"partition": "column", "partition_column": "sit"},
            DataError,
            "did you mean --partition_column site?",
        ),
        (
            {"partition": "column", "partition_column": "site"},
            DataError,
            "received 3. Fix: lower --num_clients to 3",
        ),
        ({"label_column": "lable"}, DataError, "did you mean --label_column label?"),
    ],
)
def test_bad_requests_are_refused_in_one_line(small, flags, error, message):
    with pytest.raises(error) as caught:
        make_silos(DataArguments(train_file=small, **flags), num_clients=4, min_rows=1, data_seed=1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dirichlet_without_a_label_asks_for_a_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,who\n" + "a,b\n" * 20)
    data = DataArguments(train_file=str(path), partition="dirichlet")
    with pytest.raises(
        ConfigError, match=r"no label column was found\. Fix: .* one of 'text', 'who'"
    ):
        make_silos(data, num_clients=2, min_rows=1, data_seed=1)


def test_a_null_owner_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "site": null}\n' * 5 + '{"text": "a", "site": "b"}\n' * 5)
    data = DataArguments(train_file=str(path), partition="column", partition_column="site")
    with pytest.raises(
        DataError, match="column `site`: expected names or whole numbers, received null"
    ):
        make_silos(data, num_clients=2, min_rows=1, data_seed=1)


def test_real_phrasebank_by_label(real_data):
    data = DataArguments(
        train_file=real_data("financial_phrasebank.jsonl"),
        partition="dirichlet",
        partition_alpha=0.3,
    )
    silos = make_silos(data, num_clients=4, min_rows=8, data_seed=42)
    table = client_table(silos, None, "label")
    assert json.loads(json.dumps(table)) == table
    assert sum(row["rows"] for row in table) == 4840 - 484
    total = Counter(label for part in silos.train for label in part["label"])
    summed = Counter()
    for row in table:
        summed.update(row["labels"])
        assert sum(row["labels"].values()) == row["rows"] >= 8
    assert summed == total
    shares = [row["labels"].get("neutral", 0) / row["rows"] for row in table]
    assert max(shares) - min(shares) > 0.3  # alpha 0.3 is a visible skew
    text = format_table(table).splitlines()
    assert len(text) == 5
    assert text[0].split() == ["client", "rows", "tokens", "label", "mix"]
    assert all(len(line) <= 100 for line in text)
    assert len({line.index("neutral") for line in text[1:]}) == 1  # aligned


def test_real_shakespeare_by_speaker(real_data):
    data = DataArguments(
        train_file=real_data("tiny_shakespeare.jsonl"),
        partition="column",
        partition_column="speaker",
    )
    silos = make_silos(data, num_clients=4, min_rows=8, data_seed=42)
    assert not set.intersection(*(set(part["speaker"]) for part in silos.train))
    table = client_table(silos, None, None)
    assert [row["owned"] for row in table] == silos.owned
    # many small owners: sizes even out to the smallest owner
    assert max(row["rows"] for row in table) - min(row["rows"] for row in table) <= 1
    text = format_table(table)
    assert "values: " in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_table_of_many_labels_fits():
    row = {
        "client": "client-0",
        "rows": 100,
        "rows_used": None,
        "label_tokens": None,
        "tokens": 1,
        "owned": ["site"],
    }
    text = format_table([row | {"labels": {f"a rather long label {i}": 10 for i in range(10)}}])
    assert all(len(line) <= 100 for line in text.splitlines())


def test_public_names_are_sorted_and_there():
    assert fedtune.data.__all__ == sorted(fedtune.data.__all__)
    assert all(hasattr(fedtune.data, name) for name in fedtune.data.__all__)


def test_reading_data_imports_no_torch_and_no_flower():
    code = "import sys, fedtune.data; print([m for m in ('torch', 'flwr') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
