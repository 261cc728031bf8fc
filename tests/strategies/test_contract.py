"""What holds for every registered method."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fedtune.adapters import Entry, Manifest
from fedtune.errors import ConfigError
from fedtune.server.checkpoint import ServerState, load_latest, save
from fedtune.strategies import METHODS, build_method, setting_names
from fedtune.strategies.settings import meanings
from tests.strategies.cases import (
    error,
    every_method,
    made,
    products,
    same,
    same_terms,
    trained,
    update,
)
from tests.strategies.one_round import State, one_fold, one_round, stats_of


@every_method
def test_equal_clients_count_as_one(name: str) -> None:
    """Their update is the result; a server optimizer makes of it what it makes of FedAvg's.

    Factors in new coordinates have the same products up to the rounding of the result: 1e-6 in
    fp32 (a product of sums of a few terms), and 2^-8 a factor in bf16, unless they are in the
    fp32 base.
    """
    method, clients = made(name)
    old = update(0)
    new = trained(method, old, 1)
    stats = [stats_of(steps=3, weight=1 + k) for k in range(clients)]
    for count in (clients, method.rule.least_updates()):
        found, _ = one_round(method, old, [new] * count, stats[:count])
        _, base = one_fold(method, old, [new] * count, stats[:count])
        if method.properties.refactors:
            assert not same(found, new)
            merged, wanted = products(found, base), products(new, {})
            assert error(merged, wanted, "q") < 1e-6
            assert error(merged, wanted, "e") < 2 * 2**-8
            rest = [key for key in new if "lora" not in key]
            assert same({key: found[key] for key in rest}, {key: new[key] for key in rest})
            continue
        assert base == {}
        sent = {key: value for key, value in new.items() if method.rule.travels(key)}
        assert same(found, {key: method.step(old[key], sent[key], {})[0] for key in sent})
        if method.optimizer is None:
            assert same(found, sent)


@every_method
def test_order_of_arrival_does_not_matter(name: str) -> None:
    method, clients = made(name)
    old = update(0)
    updates = [trained(method, old, k) for k in range(1, clients + 1)]
    stats = [stats_of(steps=1 + k % 3, weight=7 + 5 * k) for k in range(clients)]
    first, terms = one_round(method, old, updates, stats), one_fold(method, old, updates, stats)[1]
    for turn in range(1, clients):
        order = [*range(turn, clients), *range(turn)][::-1]
        mixed = [updates[k] for k in order], [stats[k] for k in order]
        params, state = one_round(method, old, *mixed)
        assert same(params, first[0])
        assert all(same(state[key], first[1][key]) for key in state)
        assert same_terms(one_fold(method, old, *mixed)[1], terms)


@every_method
def test_nothing_given_is_changed(name: str) -> None:
    method, clients = made(name)
    state: State = {}
    for number, (old, new) in enumerate(pairwise(range(3)), start=1):
        start = update(old)
        given = [trained(method, start, new + k, number) for k in range(clients)]
        before = {key: dict(value) for key, value in state.items()}
        copies = {key: {k: t.clone() for k, t in value.items()} for key, value in state.items()}
        _, state = one_round(method, start, given, state=before, number=number)
        assert same(start, update(old))
        for k, one in enumerate(given):
            assert same(one, trained(method, update(old), new + k, number))
        assert all(same(before[key], copies[key]) for key in before)


@every_method
def test_names_shapes_and_dtypes_stay(name: str) -> None:
    """Also that what is not trained comes back as it was; that is what clients count on."""
    method, clients = made(name)
    old = update(0)
    for number in (1, 2):
        updates = [trained(method, old, k, number) for k in range(1, clients + 1)]
        found, _ = one_round(method, old, updates, number=number)
        assert {key: Entry.of(value) for key, value in found.items()} == {
            key: Entry.of(value) for key, value in old.items() if method.rule.travels(key)
        }
        kept = [key for key in found if not method.rule.trains(key, number)]
        assert same({key: found[key] for key in kept}, {key: old[key] for key in kept})


@every_method
def test_a_resumed_server_goes_on_the_same(name: str, tmp_path: Path) -> None:
    method, clients = made(name)
    start = update(0)
    updates = [trained(method, start, k) for k in range(1, clients + 1)]
    params, state = one_round(method, start, updates)
    entries = {key: Entry.of(tensor) for key, tensor in params.items()}
    manifest = Manifest("LORA", "base", {}, entries, {}, {"q": 2.0}, {}, {})
    save(tmp_path, ServerState(1, params, {}, manifest, method_state=state))
    read = load_latest(tmp_path)
    assert read is not None
    second = [trained(method, params, k, number=2) for k in range(10, clients + 10)]
    straight = one_round(method, params, second, state=state, number=2)
    resumed = one_round(method, read.params, second, state=read.method_state, number=2)
    assert same(straight[0], resumed[0])
    assert all(same(straight[1][key], resumed[1][key]) for key in straight[1])


@every_method
def test_settings_have_defaults_ranges_and_words(name: str) -> None:
    cls = METHODS[name]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    method = cls()
    fields = {item.name: item for item in dataclasses.fields(cls)}
    assert list(meanings(cls)) == setting_names(name)
    for setting in setting_names(name):
        allowed = fields[setting].metadata["range"]
        assert allowed.holds(getattr(method, setting)), setting
        outside = [value for value in (-1.0, 0.0, 1.5, 2.0) if not allowed.holds(value)]
        for value in (*outside, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=f"{setting}: expected {allowed.expected}, rec"):
                build_method(name, weight_by="tokens", settings={setting: value})
        assert outside, "a range that holds for everything"


@every_method
def test_the_header_names_its_source(name: str) -> None:
    header = sys.modules[METHODS[name].__module__].__doc__ or ""
    assert "arXiv" in header
    assert "<-" in header, "the formula"
    assert inspect.getdoc(METHODS[name])
