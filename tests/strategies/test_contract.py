"""What holds for every registered method."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.adapters import Entry, Manifest
from fedtune.server.checkpoint import ServerState, load_latest, save
from fedtune.strategies import METHODS, Method, setting_names
from tests.strategies.one_round import State, one_round, stats_of

SHAPES = {
    "q.lora_A.weight": ((2, 7), torch.float32),
    "q.lora_B.weight": ((5, 2), torch.float32),
    "head.weight": ((3, 4), torch.bfloat16),
    "scale": ((), torch.float32),
}
every_method = pytest.mark.parametrize("name", METHODS)


def update(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype
        for name in left
    )


def made(name: str) -> tuple[Method, int]:
    """The method by its defaults, and a number of clients that it can work with."""
    method = METHODS[name]()
    return method, max(4, method.least_updates())


@every_method
def test_equal_clients_count_as_one(name: str) -> None:
    """Their update is the result; a server optimizer makes of it what it makes of FedAvg's."""
    method, clients = made(name)
    old, new = update(0), update(1)
    stats = [stats_of(steps=3, weight=1 + k) for k in range(clients)]
    found, _ = one_round(method, old, [new] * clients, stats)
    expected = {key: method.step(old[key], new[key], {})[0] for key in new}
    assert same(found, expected)
    if method.properties.axis != "server_optimizer":
        assert same(found, new)


@every_method
def test_order_of_arrival_does_not_matter(name: str) -> None:
    method, clients = made(name)
    old, updates = update(0), [update(k) for k in range(1, clients + 1)]
    stats = [stats_of(steps=1 + k % 3, weight=7 + 5 * k) for k in range(clients)]
    first = one_round(method, old, updates, stats)
    for turn in range(1, clients):
        order = [*range(turn, clients), *range(turn)][::-1]
        params, state = one_round(
            method, old, [updates[k] for k in order], [stats[k] for k in order]
        )
        assert same(params, first[0])
        assert all(same(state[key], first[1][key]) for key in state)


@every_method
def test_nothing_given_is_changed(name: str) -> None:
    method, clients = made(name)
    state: State = {}
    for old, new in pairwise(range(3)):
        given = [update(old), *(update(new + k) for k in range(clients))]
        before = {key: dict(value) for key, value in state.items()}
        copies = {key: {k: t.clone() for k, t in value.items()} for key, value in state.items()}
        _, state = one_round(method, given[0], given[1:], state=before)
        assert same(given[0], update(old))
        assert all(same(one, update(new + k)) for k, one in enumerate(given[1:]))
        assert all(same(before[key], copies[key]) for key in before)


@every_method
def test_a_resumed_server_goes_on_the_same(name: str, tmp_path: Path) -> None:
    method, clients = made(name)
    params, state = one_round(method, update(0), [update(k) for k in range(1, clients + 1)])
    entries = {key: Entry.of(tensor) for key, tensor in params.items()}
    manifest = Manifest("LORA", "base", {}, entries, {}, {"q": 2.0}, {}, {})
    save(tmp_path, ServerState(1, params, {}, manifest, method_state=state))
    read = load_latest(tmp_path)
    assert read is not None
    second = [update(k) for k in range(10, clients + 10)]
    straight = one_round(method, params, second, state=state)
    resumed = one_round(method, read.params, second, state=read.method_state)
    assert same(straight[0], resumed[0])
    assert all(same(straight[1][key], resumed[1][key]) for key in straight[1])


@every_method
def test_settings_have_defaults_ranges_and_words(name: str) -> None:
    cls = METHODS[name]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    method, described = cls(), inspect.getdoc(cls) or ""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for setting in setting_names(name):
        assert f"\n    {setting}: " in described, setting
        allowed = fields[setting].metadata["range"]
        assert allowed.holds(getattr(method, setting)), setting
        assert not allowed.holds(float("nan")), setting


@every_method
def test_the_header_names_its_source(name: str) -> None:
    header = sys.modules[METHODS[name].__module__].__doc__ or ""
    assert "arXiv" in header
    assert "<-" in header, "the formula"
