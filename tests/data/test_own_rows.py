"""Which held-out rows are a client's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data import make_silos
from fedtune.data.own_rows import own_rows


def test_by_column_they_are_those_with_its_values() -> None:
    """A value that nobody trains on is nobody's; a client may have none."""
    train = [["a", "a", "c"], ["b", "b"], ["d"]]
    held_out = ["b", "a", "x", "c", "b", "a"]
    assert own_rows("column", held_out, train, seed=1) == [[1, 3, 5], [0, 4], []]


@pytest.mark.parametrize("seed", range(5))
def test_under_dirichlet_they_are_mixed_as_its_training_rows(seed: int) -> None:
    """Of each value its share, to a row; every row once; another seed draws other rows."""
    train = [["a"] * 30 + ["b"] * 10, ["a"] * 10 + ["b"] * 10, ["b"] * 20]
    held_out = ["a", "b"] * 40
    parts = own_rows("dirichlet", held_out, train, seed=seed)
    assert parts is not None
    assert sorted(row for part in parts for row in part) == list(range(80))
    assert [sum(held_out[row] == "a" for row in part) for part in parts] == [30, 10, 0]
    assert [sum(held_out[row] == "b" for row in part) for part in parts] == [10, 10, 20]
    assert parts == own_rows("dirichlet", held_out, train, seed=seed)
    assert parts != own_rows("dirichlet", held_out, train, seed=seed + 1)


@pytest.mark.parametrize("kind", ["iid", "size"])
def test_rows_dealt_at_random_are_not_told_apart(kind: str) -> None:
    assert own_rows(kind, ["a"], [["a"], ["a"]], seed=1) is None


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Training rows of three sites, held-out rows of two of them, and some without a site."""
    sites = [site for site in ("a", "b", "c") for _ in range(8)]
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(24)], "site": sites})
    held_out = Dataset.from_dict({"text": ["one", "two", "three"], "site": ["b", "a", "b"]})
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "bare")}
    rows.to_json(paths["train"])
    held_out.to_json(paths["eval"])
    held_out.remove_columns("site").to_json(paths["bare"])
    return paths


def silos(**data: str):
    arguments = DataArguments(partition="column", partition_column="site", **data)
    return make_silos(arguments, num_clients=3, min_rows=1, data_seed=1)


def test_an_eval_file_has_them_where_it_has_the_column(files: dict[str, str]) -> None:
    own = silos(train_file=files["train"], eval_file=files["eval"]).own_evaluation
    assert own is not None
    texts = {client: list(rows["text"]) for client, rows in own.items()}
    assert texts == {"client-0": ["two"], "client-1": ["one", "three"], "client-2": []}
    assert silos(train_file=files["train"], eval_file=files["bare"]).own_evaluation is None


def test_held_out_rows_of_the_same_file(files: dict[str, str]) -> None:
    found = silos(train_file=files["train"])
    own = found.own_evaluation
    assert own is not None
    for client, owned, train in zip(own, found.owned, found.train, strict=True):
        assert set(own[client]["site"]) <= set(owned) == set(train["site"])
    assert sum(map(len, own.values())) == len(found.evaluation)
