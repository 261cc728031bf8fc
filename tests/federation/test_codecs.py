"""Whole federations under a codec: near those without one, for every method, killed ones too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedtune._flower.task_message import task_identity
from fedtune.client.app import client_app
from fedtune.client.worker import Worker
from fedtune.engines.delayed import DelayedGrid
from fedtune.engines.inline import InlineGrid, run_inline
from fedtune.server.app import server_app
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import METHODS, build_method
from fedtune.transport.coded_records import facts_of
from fedtune.transport.messages import EVALUATE, SETUP, TRAIN
from fedtune.transport.settings import CodecSettings
from tests.federation import test_mixed_ranks as mixed
from tests.federation.small import result_of, same_tensors, server_run, small_worker

# Relative L2 error of one update, as docs/transport.md has it.
ERRORS = {"bf16": 0.0017, "fp16": 0.0003, "int8": 0.0069, "nf4": 0.091, "fp4": 0.119}

# Methods whose updates do not hang on a choice, nor their factors on other rows: they end near.
NEAR = {"scaffold", "ffa_lora", "rolora", "fedsa_lora", "fedex_lora", "fedadam"}

Params = dict[str, Tensor]


def coded(
    worker: Worker,
    codec: str = "nf4",
    method: str = "fedavg",
    *,
    plan: dict[str, Any] | None = None,
    **settings: Any,
) -> ServerState:
    """Federate a worker's clients inline; `settings` are those of the codec."""
    clients = len(worker.train)
    run = server_run(clients, method=build_method(method, weight_by="tokens"), **(plan or {}))
    run.codec = CodecSettings(codec, **{"min_size": 1, **settings})
    run_inline(server_app(run), client_app(lambda: worker), clients)
    return result_of(run)


def workers(directory: Path, clients: int = 2) -> Worker:
    return small_worker(directory, clients=clients, dropout=0.0, rows=5)


def distance(left: Params, right: Params) -> float:
    parts = [float((left[name].double() - right[name].double()).norm()) ** 2 for name in left]
    return sum(parts) ** 0.5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServerState, Params]:
    """The run without a codec, and its first parameters."""
    worker = workers(tmp_path_factory.mktemp("plain"))
    first, _ = worker.initial()
    return coded(worker, "none"), first


def off(state: ServerState, plain: tuple[ServerState, Params]) -> float:
    """Relative to what the run without a codec has trained."""
    expected, first = plain
    return distance(state.params, expected.params) / distance(expected.params, first)


# --- every codec ---


@pytest.mark.parametrize(
    ("codec", "direction"),
    [*((codec, "both") for codec in ERRORS), ("bf16", "down"), ("nf4", "up"), ("nf4", "down")],
)
def test_it_ends_near_the_run_without_a_codec(
    tmp_path: Path, plain: tuple[ServerState, Params], codec: str, direction: str
) -> None:
    """Each direction adds an error of its own, and those of several rounds do not all agree."""
    state = coded(workers(tmp_path), codec, direction=direction)
    ways = 2 if direction == "both" else 1
    assert 0.1 * ERRORS[codec] < off(state, plain) < 1.5 * ways * ERRORS[codec]
    assert not any(record["refused"] for record in state.history[1:])
    check_records(state, direction)


def check_records(state: ServerState, direction: str) -> None:
    """Sums over clients, seconds, and which way has become shorter."""
    for record in state.history[1:]:
        assert record["clients"].keys() == {"client-0", "client-1"}
        for kind in ("bytes_up", "bytes_down", "bytes_up_raw", "bytes_down_raw"):
            assert sum(client[kind] for client in record["clients"].values()) == record[kind]
        assert 0 < record["time"]["codec"] < record["wall_s"]
        ways = {way: record[f"bytes_{way}"] - record[f"bytes_{way}_raw"] for way in ("up", "down")}
        shorter = {way for way, more in ways.items() if more < 0}
        assert shorter == ({"up", "down"} if direction == "both" else {direction})
        # The codec's own record, of each client: a version, settings, seconds.
        assert all(0 < ways[way] < 2 * 200 for way in {"up", "down"} - shorter)
    first = state.history[1]
    assert direction == "up" or first["bytes_down"] < 0.3 * first["bytes_down_raw"]  # all have it


def test_feedback_makes_good_what_is_lost_on_the_way_up(
    tmp_path: Path, plain: tuple[ServerState, Params]
) -> None:
    """Without, errors of three rounds add up; with it, the error is that of the last one."""
    with_it = coded(workers(tmp_path / "a"), "nf4", direction="up", feedback=True)
    without = coded(workers(tmp_path / "b"), "nf4", direction="up")
    assert off(with_it, plain) < 0.8 * off(without, plain)


def test_weights_are_coded_where_that_is_asked_for(
    tmp_path: Path, plain: tuple[ServerState, Params]
) -> None:
    """Which the arrays of a LoRA, larger than their updates, do not stand at four bits."""
    assert off(coded(workers(tmp_path / "4"), "nf4", on="weights"), plain) > 0.5
    assert off(coded(workers(tmp_path / "16"), "bf16", on="weights"), plain) < 0.5


def test_tensors_that_are_left_out_travel_as_they_are(tmp_path: Path) -> None:
    """One round: in the next one they are trained beside those that are coded."""
    expected = coded(workers(tmp_path / "plain"), "none", plan={"num_rounds": 1}).params
    found = coded(workers(tmp_path), "fp4", exclude=("*lora_A*",), plan={"num_rounds": 1}).params
    same = {name for name in found if torch.equal(found[name], expected[name])}
    assert same == {name for name in found if "lora_A" in name} != set(found)


@pytest.mark.parametrize("sites_evaluate", [False, True])
def test_held_out_rows_of_the_server_score_what_it_has(
    tmp_path: Path, sites_evaluate: bool
) -> None:
    """Those of sites score what the sites have."""
    kinds = set()

    class Watching(InlineGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            outgoing = list(messages)
            for message in outgoing:
                if facts_of(message.content):
                    kinds.add(message.metadata.message_type)
            return super().push_messages(outgoing)

    worker = workers(tmp_path)
    run = server_run(2, num_rounds=1, sites_evaluate=sites_evaluate)
    run.codec = CodecSettings("nf4", min_size=1)
    app = client_app(lambda: worker)
    with task_identity(1, 1):
        grid = Watching(app, 2)
        server_app(run)(grid, grid._contexts[2])
    result_of(run)
    assert kinds == {SETUP, TRAIN} | ({EVALUATE} if sites_evaluate else set())


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    states = [coded(workers(tmp_path / name), "nf4", feedback=True) for name in "ab"]
    assert same_tensors(states[0].params, states[1].params)
    for left, right in zip(*(state.history for state in states), strict=True):
        for key in ("bytes_up", "bytes_down", "eval_loss"):
            assert left[key] == right[key]


def test_a_narrow_model_under_its_own_codec_loses_nothing(tmp_path: Path) -> None:
    """bf16 parameters under bf16: differences of bits, and the run without a codec to the bit."""

    def build(args: Any) -> Any:
        model, tokenizer = mixed.build_model(args)
        return model.bfloat16(), tokenizer

    states = [
        coded(mixed.worker(tmp_path / codec, {"client-0": 4, "client-1": 4}, build=build), codec)
        for codec in ("none", "bf16")
    ]
    assert {tensor.dtype for tensor in states[0].params.values()} == {torch.bfloat16}
    assert same_tensors(states[0].params, states[1].params)
    last = states[1].history[-1]
    assert last["bytes_up"] < last["bytes_up_raw"]


# --- every method ---


@pytest.mark.parametrize("method", [*METHODS, "flwr:FedAvg"])
def test_every_method_takes_coded_updates(tmp_path: Path, method: str) -> None:
    """Control variates, terms of the base, factors that rest or stay with a client."""
    clients = max(3, build_method(method, weight_by="tokens").rule.least_updates())
    plan = {"num_rounds": 2, "steps": 2}

    def run(codec: str) -> tuple[ServerState, Params]:
        worker = small_worker(tmp_path / codec, clients=clients, dropout=0.0, rows=4)
        first, _ = worker.initial()
        return coded(worker, codec, method, feedback=True, plan=plan), first

    state, _ = run("nf4")
    for record in state.history[1:]:
        assert record["attempt"] == 1
        assert record["refused"] == []
        assert record["bytes_up"] < 0.4 * record["bytes_up_raw"]
        assert record["bytes_down"] < 0.8 * record["bytes_down_raw"]
    if method in NEAR:
        expected, first = run("none")
        moved = distance(expected.params, {name: first[name] for name in expected.params})
        assert distance(state.params, expected.params) < 2 * 1.5 * ERRORS["nf4"] * moved


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora", "raflora"])
def test_clients_of_several_ranks(tmp_path: Path, method: str) -> None:
    """Each gets its own view, and takes its differences to that."""
    worker = mixed.worker(tmp_path, mixed.RANKS)
    state = coded(worker, method=method, feedback=True)
    for record in state.history[1:]:
        assert record["refused"] == []
        assert record["bytes_up"] < 0.4 * record["bytes_up_raw"]
    assert state.history[-1]["eval_loss"] < state.history[0]["eval_loss"]


def test_late_updates(tmp_path: Path) -> None:
    """FedBuff: a slow client answers with the difference to what it was sent rounds ago."""
    states = {}
    for codec in ("none", "nf4"):
        worker = workers(tmp_path / codec, 3)
        run = server_run(3, method=build_method("fedbuff", weight_by="tokens"), num_rounds=6)
        run.codec = CodecSettings(codec, feedback=True, min_size=1)
        with task_identity(1, 1):
            grid = DelayedGrid(client_app(lambda worker=worker: worker), [1, 1, 5])
            server_app(run)(grid, grid._contexts[2])
        states[codec] = result_of(run)
    none, nf4 = states.values()
    assert nf4.client_rounds == none.client_rounds
    assert not any(record["refused"] for record in nf4.history[1:])
    first, _ = workers(tmp_path / "first").initial()
    assert off(nf4, (none, first)) < 2 * 1.5 * ERRORS["nf4"]
