"""The messages are Flower's: a stock strategy can drive the clients, and reads their replies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedtune.client.app import client_app
from fedtune.engines.inline import InlineGrid
from fedtune.strategies import FedAvg
from fedtune.strategies.shell import FedStrategy
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import Member, RoundTask
from fedtune.transport.records import params_of, to_arrays
from tests.federation.scripted import in_a_task
from tests.federation.small import small_worker


@pytest.mark.parametrize("weighted_by", ["num-examples", "num-tokens"])
def test_flowers_fedavg_reads_the_replies_of_real_clients(tmp_path: Path, weighted_by: str) -> None:
    """Same keys in all replies, numpy arrays, one number per metric: Flower checks all three.

    It averages in fp32, one client after the other: 3 products and sums of numbers below 1, so a
    few units in the last place of 1 (1.2e-7) from our exact mean.
    """
    worker = small_worker(tmp_path, clients=3)
    with in_a_task():
        grid = InlineGrid(client_app(lambda: worker), 3)
        names = dict(zip(grid.get_node_ids(), worker.train, strict=True))
        weight_by = "examples" if weighted_by == "num-examples" else "tokens"
        ours = FedStrategy(FedAvg(weight_by=weight_by), worker.manifest)
        ours.members = [Member(node, name) for node, name in names.items()]
        task = RoundTask("42", 1, 1, 1, worker.manifest.hash, 2, 0.0, True, 42)
        ours.tasks = dict.fromkeys(names.values(), task)
        arrays = to_arrays(worker.initial()[0])
        messages = ours.configure_train(1, arrays, ConfigRecord(), grid)
        replies = list(EagerGrid(grid).send_and_receive(messages))
        expected, _ = ours.aggregate_train(1, replies)
        flower = FlowerFedAvg(weighted_by_key=weighted_by)
        received, metrics = flower.aggregate_train(1, replies)

    assert received is not None
    assert expected is not None
    assert metrics is not None
    assert set(metrics) >= {"num-steps", "train-loss", "train-s"}
    assert metrics["num-steps"] == pytest.approx(2, abs=1e-9)  # weights sum to 1 in fp64
    theirs, mine = params_of(received), params_of(expected)
    assert theirs.keys() == mine.keys()
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=0, atol=4 * 1.2e-7)


def test_flowers_fedavg_reads_our_evaluations(tmp_path: Path) -> None:
    worker = small_worker(tmp_path, clients=2)
    with in_a_task():
        grid = InlineGrid(client_app(lambda: worker), 2)
        names = dict(zip(grid.get_node_ids(), worker.train, strict=True))
        ours = FedStrategy(FedAvg(), worker.manifest)
        ours.members = [Member(n, name, name == worker.evaluator) for n, name in names.items()]
        arrays = to_arrays(worker.initial()[0])
        messages = ours.configure_evaluate(3, arrays, ConfigRecord(), grid)
        replies = list(EagerGrid(grid).send_and_receive(messages))
        mine = ours.aggregate_evaluate(3, replies)
        theirs = FlowerFedAvg().aggregate_evaluate(3, replies)
    assert theirs is not None
    assert theirs.pop("num-tokens") == 66  # to Flower it is one more metric
    assert dict(theirs) == dict(mine)
    assert "eval_loss" in mine
