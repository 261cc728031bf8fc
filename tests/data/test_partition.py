"""Laws of every partition: each index once, enough rows, the same lists for the same seed."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.partition import KINDS, deal_values, partition
from fedtune.errors import ConfigError, DataError

VALUES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=120)


def assert_laws(parts, num_rows, num_clients, min_rows):
    assert len(parts) == num_clients
    assert sorted(itertools.chain(*parts)) == list(range(num_rows))
    assert all(len(part) >= min_rows for part in parts)
    assert all(part == sorted(part) for part in parts)
    assert all(type(i) is int for part in parts for i in part)


def parts_or_error(kind, values, num_clients, settings_):
    try:
        return partition(kind, len(values), num_clients, **settings_)
    except DataError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["iid", "size"]),
    num_clients=st.integers(1, 12),
    min_rows=st.integers(1, 9),
    spare=st.integers(0, 60),
    seed=st.integers(0, 2**32),
)
def test_laws_without_values(kind, num_clients, min_rows, spare, seed):
    num_rows = num_clients * min_rows + spare
    parts = partition(kind, num_rows, num_clients, min_rows=min_rows, seed=seed)
    assert_laws(parts, num_rows, num_clients, min_rows)
    assert parts == partition(kind, num_rows, num_clients, min_rows=min_rows, seed=seed)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["dirichlet", "column"]),
    values=VALUES,
    num_clients=st.integers(1, 6),
    min_rows=st.integers(1, 5),
    alpha=st.sampled_from([0.1, 0.5, 5.0, 1000.0]),
    seed=st.integers(0, 2**32),
)
def test_laws_with_values(kind, values, num_clients, min_rows, alpha, seed):
    settings_ = {"values": values, "alpha": alpha, "min_rows": min_rows, "seed": seed}
    parts = parts_or_error(kind, values, num_clients, settings_)
    assert parts == parts_or_error(kind, values, num_clients, settings_)
    if isinstance(parts, str):  # an impossible request is refused
        assert "Fix: " in parts
        assert kind == "column" or num_clients * min_rows > len(values)
        return
    assert_laws(parts, len(values), num_clients, min_rows)


@pytest.mark.parametrize("kind", ["iid", "size", "dirichlet"])
def test_seeds_differ(kind):
    values = ["a", "b"] * 100
    one, two = (partition(kind, 200, 4, values=values, seed=seed) for seed in (1, 2))
    assert one != two


def test_iid_sizes_differ_by_one_at_most():
    assert Counter(len(p) for p in partition("iid", 11, 4)) == {3: 3, 2: 1}


@pytest.mark.parametrize(
    ("num_rows", "min_rows", "sizes"),
    [
        (600, 1, [100, 200, 300]),  # 1 : 2 : 3
        (600, 150, [150, 200, 250]),  # the small client is filled up from the largest
        (30, 10, [10, 10, 10]),
    ],
)
def test_size_is_proportional_to_rank(num_rows, min_rows, sizes):
    assert [len(p) for p in partition("size", num_rows, 3, min_rows=min_rows)] == sizes


def test_column_keeps_each_value_with_one_client():
    values = ["a"] * 5 + ["b"] * 3 + ["c"] * 3 + ["d"]
    parts = partition("column", 12, 2, values=values)
    assert [{values[i] for i in part} for part in parts] == [{"a", "d"}, {"b", "c"}]
    assert parts == partition("column", 12, 2, values=values, seed=99)


@given(values=VALUES, order=st.randoms(use_true_random=False))
def test_column_owners_do_not_depend_on_row_order(values, order):
    shuffled = order.sample(values, len(values))
    clients = min(3, len(set(values)))

    def owners(vals):
        return [
            {vals[i] for i in part} for part in partition("column", len(vals), clients, values=vals)
        ]

    assert owners(values) == owners(shuffled)


def test_deal_values_breaks_ties_by_name():
    assert deal_values({"c": 2, "b": 2, "a": 2}, 2) == [["a", "c"], ["b"]]


def test_dirichlet_alpha_sets_the_skew():
    values = ["a", "b"] * 1000

    def largest_share(alpha):
        parts = partition("dirichlet", 2000, 4, values=values, alpha=alpha)
        mixes = [Counter(values[i] for i in part) for part in parts]
        return [max(mix.values()) / mix.total() for mix in mixes]

    # alpha 1e4: shares spread by ~0.5 %, and the binomial of ~500 rows by ~2.2 %: 4 sigma
    assert max(largest_share(1e4)) < 0.6
    assert max(largest_share(0.05)) > 0.9


def test_dirichlet_hands_rare_values_to_any_client():
    values = [f"speaker {i}" for i in range(400)]  # one row each
    sizes = [len(p) for p in partition("dirichlet", 400, 4, values=values, alpha=1e4)]
    assert min(sizes) > 60  # mean 100, binomial spread 8.7


@pytest.mark.parametrize(
    ("kind", "rows", "clients", "more", "error", "message"),
    [
        ("iid", 3, 4, {}, DataError, "expected at most one client per row (3 rows), received 4"),
        ("iid", 30, 4, {"min_rows": 8}, DataError, "4 clients x 8 rows need 32 rows, received 30"),
        ("size", 30, 4, {"min_rows": 8}, DataError, "Fix: lower --min_rows"),
        ("iid", 3, 0, {}, ConfigError, "--num_clients: expected at least 1, received 0"),
        ("iid", 3, 1, {"min_rows": 0}, ConfigError, "--min_rows: expected at least 1, received 0"),
        (
            "shards",
            3,
            1,
            {},
            ConfigError,
            "expected one of iid, dirichlet, column, size, received 'shards'",
        ),
        ("column", 4, 2, {}, DataError, "expected one value per row (4), received none"),
        (
            "column",
            4,
            3,
            {"values": "aabb"},
            DataError,
            "expected at least 3 distinct values (one per client), received 2",
        ),
        (
            "column",
            9,
            2,
            {"values": "aaaaaaaab", "min_rows": 3},
            DataError,
            "received 1 for client 1. Fix: lower --min_rows",
        ),
        (
            "dirichlet",
            4,
            2,
            {"values": "aabb", "alpha": 0.0},
            ConfigError,
            "expected a number above 0, received 0.0",
        ),
        (
            "dirichlet",
            4,
            2,
            {"values": "aab"},
            DataError,
            "expected one value per row (4), received 3",
        ),
    ],
)
def test_bad_requests_are_refused_in_one_line(kind, rows, clients, more, error, message):
    with pytest.raises(error) as caught:
        partition(kind, rows, clients, **more)
    assert message in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [1, 2, 10])
@pytest.mark.parametrize("clients", [10, 50])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001])
def test_dirichlet_fills_up_small_clients(labels, clients, alpha, caplog):
    values = [i % labels for i in range(6000)]
    free = partition_free(values, clients, alpha)
    caplog.clear()
    parts = partition("dirichlet", 6000, clients, values=values, alpha=alpha, min_rows=8)
    assert_laws(parts, 6000, clients, 8)
    # One draw: clients with enough rows of their own only ever give, and no row moves in vain.
    missing = sum(max(0, 8 - size) for size in free)
    taken = sum(max(0, size - len(part)) for size, part in zip(free, parts, strict=True))
    assert taken == missing
    said = [record.message for record in caplog.records]
    few = sum(size < 8 for size in free)
    if missing:
        assert f"{few} of {clients} clients drew fewer than 8 rows; {missing} rows" in said[0]
    else:
        assert not said


def partition_free(values, clients, alpha, seed=42):
    """Sizes as drawn, by the definition: multinomial counts of Dirichlet shares, label by label."""
    rng = np.random.default_rng(seed)
    sizes = np.zeros(clients, dtype=int)
    for label in sorted(set(values), key=str):
        shares = rng.dirichlet([alpha] * clients)
        sizes += rng.multinomial(values.count(label), shares)
    return sizes.tolist()


def test_dirichlet_gives_every_client_its_share_where_all_rows_are_needed(caplog):
    parts = partition("dirichlet", 40, 10, values=["a"] * 40, alpha=0.01, min_rows=4)
    assert [len(part) for part in parts] == [4] * 10


def test_kinds_match_the_flag():
    from typing import get_args, get_type_hints

    from fedtune.config import DataArguments

    assert get_args(get_type_hints(DataArguments)["partition"]) == KINDS
