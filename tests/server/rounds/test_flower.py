"""The messages are Flower's: a stock strategy can drive the clients, and reads their replies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedtune.client.app import client_app
from fedtune.client.worker import Worker
from fedtune.engines.inline import InlineGrid
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import FedAvg
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import Member
from fedtune.transport.records import params_of
from tests.federation.scripted import in_a_task
from tests.federation.small import central, small_worker


class Kept(EagerGrid):
    """Keeps the replies."""

    def send_and_receive(self, *args: Any, **given: Any) -> Iterator[Message]:
        self.replies = list(super().send_and_receive(*args, **given))
        return iter(self.replies)


def start_of(worker: Worker) -> ServerState:
    params, static = worker.initial()
    return ServerState(0, params, static, worker.manifest)


@pytest.mark.parametrize("weighted_by", ["num-examples", "num-tokens"])
def test_flowers_fedavg_reads_the_replies_of_real_clients(tmp_path: Path, weighted_by: str) -> None:
    """Same keys in all replies, numpy arrays, one number per metric: Flower checks all three.

    It averages in fp32, one client after the other: 3 products and sums of numbers below 1, so a
    few units in the last place of 1 (1.2e-7) from our exact mean.
    """
    worker = small_worker(tmp_path, clients=3)
    with in_a_task():
        grid = Kept(InlineGrid(client_app(lambda: worker), 3))
        members = [Member(*pair) for pair in zip(grid.get_node_ids(), worker.train, strict=True)]
        weight_by = "examples" if weighted_by == "num-examples" else "tokens"
        workflow = central(grid, FedAvg(weight_by=weight_by), steps=2)
        mine = workflow.play(1, 1, members, start_of(worker)).params
        flower = FlowerFedAvg(weighted_by_key=weighted_by)
        received, metrics = flower.aggregate_train(1, grid.replies)

    assert received is not None
    assert metrics is not None
    assert set(metrics) >= {"num-steps", "train-loss", "train-s"}
    assert metrics["num-steps"] == pytest.approx(2, abs=1e-9)  # weights sum to 1 in fp64
    theirs = params_of(received)
    assert theirs.keys() == mine.keys()
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=0, atol=4 * 1.2e-7)


def test_flowers_fedavg_reads_our_evaluations(tmp_path: Path) -> None:
    worker = small_worker(tmp_path, clients=2)
    with in_a_task():
        grid = Kept(InlineGrid(client_app(lambda: worker), 2))
        names = dict(zip(grid.get_node_ids(), worker.train, strict=True))
        members = [Member(n, name, name == worker.evaluator) for n, name in names.items()]
        mine = central(grid).score(3, members, start_of(worker)).mean
        theirs = FlowerFedAvg().aggregate_evaluate(3, grid.replies)
    assert theirs is not None
    assert theirs.pop("num-tokens") == 66  # to Flower it is one more metric
    assert dict(theirs) == dict(mine)
    assert "eval_loss" in mine
