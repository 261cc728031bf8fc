"""Rows are the same whatever the file kind; every bad source is one line that ends with the fix."""

from __future__ import annotations

import csv
import json
import os

import datasets
import pytest
from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data import hold_out, load_rows, load_split, make_silos
from fedtune.data.origin import origin_of, row_name
from fedtune.errors import ConfigError, DataError

ROWS = [
    {"instruction": "Say hi, twice.", "input": "", "output": "hi\nhi", "silo": "NA"},
    {"instruction": 'Quote "this".', "input": "null", "output": "été", "silo": "b"},
    {"instruction": "Third", "input": "x", "output": "y", "silo": "b"},
]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_kind_gives_equal_rows(tmp_path, suffix):
    name = write(tmp_path / f"rows.{suffix}", ROWS)
    assert load_rows(DataArguments(train_file=name)).to_list() == ROWS


def test_a_directory_as_dataset_name(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    assert load_rows(DataArguments(dataset_name=str(tmp_path))).to_list() == ROWS


def test_default_is_the_corpus_inside_the_package():
    from fedtune.assets import CORPUS_FILE

    if not CORPUS_FILE.exists():
        pytest.skip("the corpus is not made yet (tools/make_tiny_llm.py)")
    rows = load_rows(DataArguments())
    assert {"instruction", "input", "output", "silo", "label"} <= set(rows.column_names)


def test_max_rows_keeps_the_first(tmp_path):
    name = write(tmp_path / "rows.jsonl", ROWS)
    first = load_rows(DataArguments(train_file=name, max_rows=2))
    assert first.to_list() == ROWS[:2]
    assert origin_of(first).whole().to_list() == ROWS[:2]  # others are not counted as bad
    assert row_name(first, 1) == "row 2 (line 2 of rows.jsonl)"
    assert len(load_rows(DataArguments(train_file=name, max_rows=99))) == 3


def test_a_changed_file_is_read_again_even_with_its_old_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    name = write(path, [{"text": "a"}])
    assert load_rows(DataArguments(train_file=name))["text"][0] == "a"
    time_ns = path.stat().st_mtime_ns
    write(path, [{"text": "b"}])
    os.utime(path, ns=(time_ns, time_ns))
    assert load_rows(DataArguments(train_file=name))["text"][0] == "b"


def test_no_progress_bar_and_the_setting_comes_back(tmp_path, capfd):
    datasets.enable_progress_bars()
    load_rows(DataArguments(train_file=write(tmp_path / "rows.jsonl", ROWS)))
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


# ---- held-out rows


def numbered(count):
    return Dataset.from_dict({"text": [str(i) for i in range(count)]})


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(100, 0.1, 10), (5, 0.01, 1), (3, 0.9, 2)]
)
def test_hold_out_splits_rows_in_two(count, fraction, held_out):
    train, evaluation = hold_out(numbered(count), fraction, data_seed=1)
    assert len(evaluation) == held_out
    kept, out = ([int(t) for t in part["text"]] for part in (train, evaluation))
    assert sorted(kept + out) == list(range(count))
    assert kept == sorted(kept)
    assert out == sorted(out)


def test_hold_out_depends_on_data_seed_alone(tmp_path):
    name = write(tmp_path / "r.jsonl", [{"text": str(i), "label": "ab"[i % 2]} for i in range(80)])
    shapes = [("iid", 2), ("iid", 5), ("size", 3), ("dirichlet", 2), ("column", 2)]

    def held_out(kind, clients, seed):
        data = DataArguments(train_file=name, partition=kind, partition_column="label")
        silos = make_silos(data, num_clients=clients, min_rows=1, data_seed=seed)
        return silos.evaluation["text"][:]

    assert len({tuple(held_out(*shape, 7)) for shape in shapes}) == 1
    assert held_out("iid", 2, 7) != held_out("iid", 2, 8)


def test_eval_file_leaves_all_training_rows(tmp_path):
    data = DataArguments(
        train_file=write(tmp_path / "train.jsonl", ROWS),
        eval_file=write(tmp_path / "eval.csv", ROWS[:1]),
        eval_fraction=0.0,  # not read when there is a file
    )
    train, evaluation = load_split(data, data_seed=1)
    assert (train.to_list(), evaluation.to_list()) == (ROWS, ROWS[:1])


# ---- bad input

BAD_FILES = {
    "empty.jsonl": (b"", "expected at least one row, received none"),
    "blank.jsonl": (b"\n\n", "expected at least one row, received none"),
    "header.csv": (b"text,label\n", "expected at least one row, received none"),
    "array.json": (b"[]", "expected at least one row, received none"),
    "broken.jsonl": (
        b'{"text": "a"}\n{"text": \n{"text": "c"}\n',
        "line 2 is no JSON (Expecting value)",
    ),
    "late.jsonl": (b'{"text": "a"}\n' * 50 + b"oops\n", "line 51 is no JSON (Expecting value)"),
    "array-broken.json": (b'[\n{"text": "a"},\n{"text" 1}\n]', "line 3 is no JSON"),
    "numbers.jsonl": (b"1\n2\n", "line 1 is a JSON int, not an object"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "line 3 has 3 cells, its header 2 cells"),
    "text.parquet": (b"hello", "Parquet file size is 5 bytes"),
    "rows.txt": (
        b"hello",
        "expected a file that ends in .csv, .tsv, .json, .jsonl, .ndjson, .parquet",
    ),
}


@pytest.mark.parametrize("flag", ["train_file", "eval_file"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path, name, flag):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    files = {"train_file": write(tmp_path / "good.jsonl", ROWS), flag: str(path)}
    with pytest.raises(DataError) as caught:
        load_split(DataArguments(**files), data_seed=1)
    assert message in str(caught.value)
    assert f"--{flag}" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"which does not exist\. Fix: .*has train\.jsonl"):
        load_rows(DataArguments(train_file=str(tmp_path / "trian.jsonl")))


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(DataError, match="expected a file that ends in"):
        load_rows(DataArguments(train_file=str(tmp_path)))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    name = write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"rows\.jsonl: Permission denied\. Fix: check who may"):
        load_rows(DataArguments(train_file=name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"dataset_name": "a/b", "train_file": "c.csv"},
            "expected one source of rows, received both (a/b, c.csv)",
        ),
        (
            {"eval_fraction": 0.0},
            "--eval_fraction: expected a number between 0 and 1 (both excluded), received 0",
        ),
        ({"eval_fraction": 1.0}, "received 1"),
        ({"eval_fraction": -0.5}, "received -0.5"),
        ({"eval_fraction": float("nan")}, "received nan"),
        ({"max_rows": 0}, "--max_rows: expected at least 1, received 0"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, flags, message):
    flags = {"train_file": write(tmp_path / "rows.jsonl", ROWS)} | flags
    with pytest.raises(ConfigError) as caught:
        load_split(DataArguments(**flags), data_seed=1)
    assert message in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_as_dataset_name_is_told_the_flag(tmp_path):
    name = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"Fix: --train_file .*rows\.jsonl"):
        load_rows(DataArguments(dataset_name=name))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'no/body'\non the Hub")

    monkeypatch.setattr("fedtune.data.load.load_dataset", refuse)
    with pytest.raises(DataError) as caught:
        load_rows(DataArguments(dataset_name="no/body"))
    assert str(caught.value) == (
        "--dataset_name: expected a data set with a split `train`, received 'no/body': Couldn't "
        "reach 'no/body'. Fix: check the id and the network, or use --train_file."
    )


def test_one_row_cannot_be_held_out():
    with pytest.raises(DataError, match="expected at least 2 rows to hold one out, received 1"):
        hold_out(numbered(1), 0.1, data_seed=1)
