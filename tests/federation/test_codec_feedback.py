"""What a codec lost comes with the next update, whatever became of the updates in between."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from torch import Tensor

from fedtune._flower.task_message import task_identity
from fedtune.client.app import client_app
from fedtune.client.replies import LocalResult, Sent
from fedtune.client.round_files import RoundFiles
from fedtune.client.worker import Worker
from fedtune.server.app import server_app
from fedtune.server.checkpoint import ServerState
from fedtune.server.store import RunStore
from fedtune.strategies import build_method
from fedtune.transport.messages import TRAIN, RoundTask
from fedtune.transport.records import config_of
from fedtune.transport.settings import CodecSettings
from tests.federation.scripted import ScriptedGrid, counted
from tests.federation.small import server_run, small_worker

ROUNDS = 4

Params = dict[str, Tensor]


class Killed(Exception):
    """Ends a run from within."""


class Book:
    """A run in which one client is asked a round, whose updates and parameters are written down.

    Attributes:
        moved: by client and round, what it has trained in its last attempt.
        params: by round, the global parameters after it.
        attempts: rounds in the order in which they were trained.
    """

    def __init__(self, directory: Path, method: str = "fedavg", clients: int = 1) -> None:
        self.directory, self.method, self.clients = directory, method, clients
        self.moved: dict[tuple[str, int], Params] = {}
        self.params: dict[int, Params] = {}
        self.attempts: list[int] = []
        self.state: ServerState | None = None

    def run(
        self, *, rounds: int = ROUNDS, kill_in: int = 0, save_every: int = 1, **network: Any
    ) -> None:
        """Run, or go on, with a new process of everybody."""
        directory = self.directory / "server"
        directory.mkdir(exist_ok=True)
        store = RunStore(directory, num_rounds=rounds, save_every_rounds=save_every)

        def keep(state: ServerState, record: dict[str, Any]) -> None:
            self.params[state.round] = {name: t.clone() for name, t in state.params.items()}
            if state.round == kill_in > 0:
                raise Killed
            store.on_round(state, record)

        run = server_run(
            self.clients,
            method=build_method(self.method, weight_by="tokens"),
            on_round=keep,
            start=store.load(),
            fraction_train=1 / self.clients,
            num_rounds=rounds,
            steps=2,
            round_timeout_s=0.5,
        )
        run.codec = CodecSettings("nf4", feedback=True, min_size=1)
        worker = self.watched()
        app = client_app(lambda: worker)
        with task_identity(1, 1):
            grid = ScriptedGrid(app, self.clients, **network)
            server_app(run)(grid, grid._contexts[2])
        assert run.error is None
        self.state = run.result

    def watched(self) -> Worker:
        """A worker that tells what it trains."""
        directory = self.directory / "clients"
        worker = small_worker(directory, clients=self.clients, dropout=0.0, rows=5)
        train = worker.train_round

        def train_round(client: str, task: RoundTask, sent: Sent) -> LocalResult:
            result = train(client, task, sent)
            self.attempts.append(task.round)
            self.moved[client, task.round] = {
                name: tensor.double() - sent.params[name].double()
                for name, tensor in result.params.items()
            }
            return result

        vars(worker)["train_round"] = train_round
        return worker

    def residual(self, client: str, number: int) -> Params:
        """What is left over after a round."""
        kept = RoundFiles(self.directory / "clients" / client / "transport" / "residual").read(
            number
        )
        assert kept is not None
        return {name.removeprefix("arrays/"): tensor for name, tensor in kept.items()}

    def assert_sums(self) -> None:
        """All that counted of what a client has trained has arrived, but for what is left over.

        Parameters are below 1; each round takes a difference, adds what was left, takes what is
        left, and adds to the parameters, in fp32.
        """
        for client in sorted({client for client, _ in self.moved}):
            rounds = sorted(number for name, number in self.moved if name == client)
            residual = self.residual(client, rounds[-1])
            for name, left in residual.items():
                trained = sum(self.moved[client, number][name] for number in rounds)
                arrived = sum(
                    self.params[number][name].double() - self.params[number - 1][name].double()
                    for number in rounds
                )
                error = (arrived + left.double() - trained).abs().max()
                assert float(error) < 4 * len(rounds) * 2**-24
                assert float(left.abs().max()) > 1e-4  # which counts, then
            assert residual.keys() == self.params[0].keys()


def test_it_adds_up(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.run()
    assert book.attempts == [1, 2, 3, 4]
    book.assert_sums()


def test_a_client_that_was_not_asked_keeps_what_is_left_over(tmp_path: Path) -> None:
    book = Book(tmp_path, clients=2)
    book.run(rounds=6)
    rounds = [number for client, number in book.moved if client == "client-0"]
    assert any(later - earlier > 1 for earlier, later in pairwise(rounds))
    assert 2 <= len(rounds) <= 4
    book.assert_sums()


def spoiled_once(rounds: tuple[int, ...], lost: bool) -> Any:
    """The first reply of these rounds is no good, or does not arrive."""
    left = list(rounds)

    def deliver(reply: Message) -> Iterable[Message]:
        if reply.metadata.message_type == TRAIN and reply.has_content():
            number = int(str(config_of(reply.content)["round"]))
            if number in left:
                left.remove(number)
                if lost:
                    return []
                counted(reply.content, num_examples=None)
        return [reply]

    return deliver


@pytest.mark.parametrize("lost", [False, True], ids=["refused", "lost"])
def test_an_update_that_did_not_count_is_rolled_back(tmp_path: Path, lost: bool) -> None:
    """The next attempt starts from what was left over before it, not after it."""
    book = Book(tmp_path)
    book.run(deliver=spoiled_once((2, 4), lost))
    assert book.attempts == [1, 2, 2, 3, 4, 4]
    assert book.state is not None
    assert [record["attempt"] for record in book.state.history[1:]] == [1, 2, 1, 2]
    book.assert_sums()


@pytest.mark.parametrize(
    ("kill_in", "save_every", "attempts"),
    [(2, 1, [1, 2, 2, 3, 4]), (3, 2, [1, 2, 3, 3, 4]), (4, 2, [1, 2, 3, 4, 3, 4])],
)
def test_a_killed_run_goes_on(
    tmp_path: Path, kill_in: int, save_every: int, attempts: list[int]
) -> None:
    """From the round that is durable, of which the client still knows what was left over."""
    book = Book(tmp_path)
    with pytest.raises(Killed):
        book.run(kill_in=kill_in, save_every=save_every)
    book.run(save_every=save_every)
    assert book.attempts == attempts
    assert book.state is not None
    assert book.state.round == ROUNDS
    assert len(book.state.history) == ROUNDS + 1
    book.assert_sums()


def test_other_factors_take_over_nothing(tmp_path: Path) -> None:
    """FlexLoRA factorizes anew each round: what was lost of the old factors is in no direction of
    the new ones. What is left over is then the error of the last update alone.
    """
    book = Book(tmp_path, "flexlora")
    book.run()
    left = book.residual("client-0", ROUNDS)
    for name, moved in book.moved["client-0", ROUNDS].items():
        # nf4 errs by a sixth of a block's largest value, and this is one of the tensor's.
        assert float(left[name].abs().max()) < 0.16 * float(moved.abs().max())
