"""Where and in which order clients run does not change a bit of the result."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedtune.engines.inline import InlineGrid
from fedtune.run.federate import federate
from fedtune.server.app import server_app
from fedtune.strategies import fixed_global
from fedtune.strategies.lora import LORA_RULES
from tests.federation.small import (
    ROUNDS,
    STEPS,
    arguments,
    build_model,
    eval_losses,
    result_of,
    run_on,
    run_small,
    same_tensors,
    server_run,
    small_worker,
    training_arguments,
)

Order = Callable[[list[str]], list[str]]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'fedtune[ray]'"
)


def series(record: dict[str, Any]) -> dict[str, Any]:
    """What a run computes, without what it took."""
    kept = ("round", "eval_loss", "train_loss", "samples", "tokens", "update_norm", "client_drift")
    return {key: record.get(key) for key in kept}


def test_fixed_global_is_flat_to_the_last_bit(tmp_path: Path) -> None:
    """Every evaluation scores the same adapter, although the live model was trained in between."""
    worker = small_worker(tmp_path, clients=2, dropout=0.1)
    start, _ = worker.initial()
    state = run_small(worker, method=fixed_global())
    assert len(set(eval_losses(state))) == 1
    assert same_tensors(state.params, start)
    losses = [record["train_loss"] for record in state.history[1:]]
    assert len(set(losses)) == ROUNDS  # clients did train, on other rows every round
    assert all(record["client_drift"] is not None for record in state.history[1:])


@pytest.mark.parametrize("clients", [2, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_identical_clients_are_one_client(tmp_path: Path, clients: int, dropout: float) -> None:
    """Same rows, same seed, same dropout masks: K equal updates, whose mean is that update."""
    one = run_small(small_worker(tmp_path / "one", dropout=dropout))
    many = run_small(
        small_worker(tmp_path / "many", clients=clients, same_rows=True, dropout=dropout)
    )
    assert same_tensors(one.params, many.params)
    assert eval_losses(one) == eval_losses(many)
    assert many.history[-1]["samples"] == clients * one.history[-1]["samples"]
    assert many.history[-1]["client_drift"] == pytest.approx(0, abs=1e-7)


def grid_in_order(order: Order) -> type[InlineGrid]:
    """An inline grid that runs its queue in another order."""

    class Ordered(InlineGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            waiting = [key for key in self._queue if key in set(message_ids)]
            return super().pull_messages(order(waiting)[:1])

    return Ordered


@pytest.mark.parametrize(
    "order",
    [lambda ids: ids[::-1], lambda ids: sorted(ids, key=lambda key: -int(key[1:]) % 3)],
    ids=["reversed", "mixed"],
)
def test_arrival_order_does_not_matter(tmp_path: Path, order: Order) -> None:
    """Clients share one live model, so this also shows that nothing leaks from one to the next."""
    straight = run_small(small_worker(tmp_path / "a", clients=4), fraction_train=0.75)
    other = run_on(
        small_worker(tmp_path / "b", clients=4), grid_in_order(order), fraction_train=0.75
    )
    assert same_tensors(straight.params, other.params)
    assert eval_losses(straight) == eval_losses(other)
    arrived = [[reply["client"] for reply in record["replies"]] for record in other.history[1:]]
    assert any(names != sorted(names) for names in arrived)


@pytest.mark.parametrize("name", ["fedex_lora", "rolora"])
def test_figures_do_not_depend_on_the_order(tmp_path: Path, name: str) -> None:
    """Also those that are sums over clients, to the last bit."""
    method = LORA_RULES[name]()
    given = {"method": method, "num_rounds": 2, "steps": 2}
    straight = run_small(small_worker(tmp_path / "a", clients=4), **given)
    turned = grid_in_order(lambda ids: ids[::-1])
    other = run_on(small_worker(tmp_path / "b", clients=4), turned, **given)
    for left, right in zip(straight.history[1:], other.history[1:], strict=True):
        for key in ("client_drift", "residual", "residual_fedavg", "train_loss"):
            assert left[key] == right[key], key


def test_node_order_does_not_matter(tmp_path: Path) -> None:
    straight = run_small(small_worker(tmp_path / "a", clients=3))
    turned = small_worker(tmp_path / "b", clients=3)
    turned.train = dict(reversed(turned.train.items()))
    assert turned.names == ["client-2", "client-1", "client-0"]
    state = run_small(turned)
    assert same_tensors(straight.params, state.params)
    assert eval_losses(straight) == eval_losses(state)


def test_a_federation_larger_than_ten(tmp_path: Path) -> None:
    """Names are those of the data, whatever their number."""
    worker = small_worker(tmp_path, clients=12, rows=4)
    record = run_small(worker, num_rounds=1, steps=1).history[1]
    assert sorted(reply["client"] for reply in record["replies"]) == sorted(worker.train)


def test_inline_twice_is_the_same_twice(tmp_path: Path) -> None:
    states = [
        run_small(small_worker(tmp_path / name, clients=3), fraction_train=0.5) for name in "ab"
    ]
    assert same_tensors(states[0].params, states[1].params)
    histories = [[series(record) for record in state.history] for state in states]
    assert histories[0] == histories[1]
    other = run_small(small_worker(tmp_path / "c", clients=3, seed=43, data_seed=43), seed=43)
    assert not same_tensors(states[0].params, other.params)


def build_model_in_actor(args: Any) -> Any:
    """Leaves a note of how many threads the process has that builds the model."""
    model, tokenizer = build_model(args)
    directory = Path(args.training.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"threads-{os.getpid()}").write_text(str(torch.get_num_threads()))
    return model, tokenizer


@needs_ray
def test_ray_is_inline(tmp_path: Path) -> None:
    """Equal bits at equal threads, for clients that wander between actors, skip rounds and drop
    out; actors use the threads that --cpus_per_client gives them.
    """
    results = []
    for engine in ("inline", "ray"):
        directory = tmp_path / engine
        args = arguments(
            training_arguments(directory / "model"),
            engine=engine,
            fraction_train=0.75,
            num_clients=4,
            cpus_per_client=1.0,
        )
        worker = small_worker(directory / "clients", clients=4)
        worker.args, worker.build_model = args, build_model_in_actor
        first, last = federate(args, worker, directory)
        results.append((first, last))
    (first, inline), (ray_first, ray) = results
    assert same_tensors(first.params, ray_first.params)
    assert same_tensors(inline.params, ray.params)
    assert [series(record) for record in inline.history] == [
        series(record) for record in ray.history
    ]
    actors = list((tmp_path / "ray" / "model").glob("threads-*"))
    assert actors
    assert {path.read_text() for path in actors} == {"1"}
    assert not list((tmp_path / "ray").rglob("*.pkl"))


@needs_ray
@pytest.mark.slow
def test_cpus_per_client_are_its_threads(tmp_path: Path) -> None:
    """Two CPUs a client on two CPUs: one client at a time, with two threads."""
    from fedtune.engines.ray import run_ray

    worker = small_worker(tmp_path / "clients", clients=3)
    worker.args = arguments(training_arguments(tmp_path / "model"))
    worker.build_model = build_model_in_actor
    run = server_run(3, num_rounds=1)
    run_ray(server_app(run), worker, cpus_per_client=2.0, gpus_per_client=0.0)
    state = result_of(run)
    assert state.history[-1]["samples"] == 3 * (STEPS * 2)
    (actor,) = (tmp_path / "model").glob("threads-*")
    assert actor.read_text() == "2"


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fedsa_lora", "ffa_lora"])
def test_rules_on_ray_are_those_inline(tmp_path: Path, name: str) -> None:
    """What is added to the base, sent once or kept by a client reaches every actor."""
    from fedtune.engines.ray import run_ray

    states = []
    for engine in ("inline", "ray"):
        directory = tmp_path / engine
        worker = small_worker(directory / "clients", clients=4)
        given = {"method": LORA_RULES[name](), "fraction_train": 0.75}
        if engine == "inline":
            states.append(run_small(worker, **given))
            continue
        run = server_run(4, **given)
        run_ray(server_app(run), worker, cpus_per_client=1.0, gpus_per_client=0.0)
        states.append(result_of(run))
    inline, ray = states
    assert same_tensors(inline.params, ray.params)
    assert same_tensors(inline.static, ray.static)
    assert same_tensors(inline.base.tensors(), ray.base.tensors())
    assert bool(inline.base.terms) == (name in ("flora", "fedex_lora"))
    keys = ("residual", "residual_fedavg", "base_rank", "base_error")
    for left, right in zip(inline.history, ray.history, strict=True):
        assert series(left) == series(right)
        assert [left.get(key) for key in keys] == [right.get(key) for key in keys]
        ours, theirs = (
            sorted(record.get("eval_clients", []), key=lambda row: row["client"])
            for record in (left, right)
        )
        assert ours == theirs
