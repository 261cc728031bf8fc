"""Whatever is done to rows, an error names the row that stands in the file."""

from __future__ import annotations

import copy
import csv
import json
import pickle

import pytest
from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data import (
    as_classification_rows,
    as_label_prompt_rows,
    as_language_rows,
    make_silos,
)
from fedtune.data.origin import bad_rows, mark, origin_of, row_name, select
from fedtune.errors import DataError

COUNT = 60


def rows_with(bad, cell):
    """Rows whose text says their number; those in `bad` hold `cell` for an answer."""
    rows = [
        {"instruction": f"Say {i}.", "output": f"{i}.", "label": "xy"[i % 2]} for i in range(COUNT)
    ]
    for i in bad:
        rows[i]["output"] = cell
    return rows


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join("\n" * (i % 2) + json.dumps(row) for i, row in enumerate(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({**row, "instruction": f"{row['instruction']}\n"} for row in rows)
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def line_in(path, number):
    """The line on which the record of this row begins, found by its text."""
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if f"Say {number}." in line)
    return at if path.suffix == ".json" else at + 1  # an object opens on a line of its own


@pytest.mark.parametrize("kind", ["iid", "size", "dirichlet", "column"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_row_keeps_its_number_and_line(tmp_path, suffix, kind):
    path = tmp_path / f"rows.{suffix}"
    data = DataArguments(
        train_file=write(path, rows_with((), "")), partition=kind, partition_column="label"
    )
    silos = make_silos(data, num_clients=2, min_rows=1, data_seed=3)
    seen = []
    for part in (*silos.train, silos.evaluation):
        assert part.column_names == ["instruction", "output", "label"]  # nothing is added
        for i, row in enumerate(part):
            number = int(row["output"][:-1])
            seen.append(number)
            where = f"(line {line_in(path, number)} of" if suffix != "parquet" else "of"
            assert row_name(part, i).startswith(f"row {number + 1} {where} rows.{suffix}")
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("bad", [(37,), (37, 41, 58), (0, 59)])
def test_all_bad_rows_are_counted_whoever_got_them(tmp_path, bad, tokenizer):
    """The first bad row of the file is named by every client that has any, and by no other."""
    name = write(tmp_path / "rows.parquet", rows_with(bad, " "))
    silos = make_silos(
        DataArguments(train_file=name, label_column="output"),
        num_clients=3,
        min_rows=1,
        data_seed=3,
    )
    more = {1: "", 2: " and 1 more row", 3: " and 2 more rows"}[len(bad)]
    refused = 0
    for part in (*silos.train, silos.evaluation):
        if " " not in part["output"]:
            continue
        refused += 1
        with pytest.raises(DataError) as caught:
            as_language_rows(part, DataArguments(text_column="output"), tokenizer)
        assert f"an empty cell in row {bad[0] + 1} of rows.parquet{more}. " in str(caught.value)
    assert refused


def test_converted_rows_know_where_they_come_from(tmp_path, tokenizer):
    rows = [
        {"text": f"t{i} " * (200 if i in (7, 30) else 1), "label": "xy"[i % 2]} for i in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArguments(train_file=str(path))
    silos = make_silos(data, num_clients=3, min_rows=1, data_seed=1)
    convert = {
        "language": lambda part: as_language_rows(part, data, tokenizer),
        "prompt": lambda part: as_label_prompt_rows(part, data),
        "class": lambda part: as_classification_rows(part, data, ["x", "y"])[0],
    }
    for make in convert.values():
        for part in (*silos.train, silos.evaluation):
            made = make(part)
            assert list(origin_of(made).positions) == list(origin_of(part).positions)
            assert origin_of(made).whole().column_names == made.column_names
            assert len(origin_of(made).whole()) == 40


def test_row_preserving_changes_keep_the_origin_and_others_lose_it():
    rows = select(mark(Dataset.from_dict({"a": [1, 2, 3]}), "here"), [2, 0])
    assert row_name(rows.rename_column("a", "b"), 1) == "row 1 of here"
    assert row_name(copy.deepcopy(rows), 0) == "row 3 of here"
    assert row_name(pickle.loads(pickle.dumps(rows)), 0) == "row 3 of here"
    assert row_name(rows.shuffle(seed=1), 0) == "row 1 (rows count from 1)"
    assert row_name(rows.filter(lambda row: row["a"] > 1), 0) == "row 1 (rows count from 1)"


def test_a_check_of_good_rows_looks_no_further():
    whole = mark(Dataset.from_dict({"a": [1, 2, 3]}), "here")
    looked = []

    def check(rows):
        looked.append(len(rows))
        return [(i, "3") for i, value in enumerate(rows["a"]) if value == 3]

    assert bad_rows(select(whole, [0, 1]), check) is None
    assert looked == [2]
    bad = bad_rows(select(whole, [2]), check)
    assert (bad.received, bad.where) == ("3", "row 3 of here")
    assert looked == [2, 1, 3]
