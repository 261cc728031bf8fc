"""A scripted server: talks to a trainer's real socket from a thread, one connection a message."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Client
from typing import Any

from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.relay.folder import RunFolder, SitePlan
from fedtune.relay.frames import Frame, decode, encode
from fedtune.transport import messages
from fedtune.transport.messages import RoundTask, pack
from fedtune.transport.records import config_of, metrics_of, params_of

PLAN = SitePlan(
    run="run", client="site", num_rounds=3, steps=4, epochs=0.0, carry=True, seed=42,
    idle_timeout_s=20.0,
)  # fmt: skip
CONNECT_S = 60.0

Params = dict[str, Tensor]


def connect(folder: RunFolder, key: bytes | None = None) -> Any:
    """A connection to the trainer, once it is there."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return Client(str(folder.socket), "AF_UNIX", authkey=key or folder.authkey)
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, EOFError):
            assert time.monotonic() < deadline, "no trainer"
            time.sleep(0.02)


def send(folder: RunFolder, frame: bytes) -> Frame:
    """One request and its reply."""
    with connect(folder) as connection:
        connection.send_bytes(frame)
        return decode(connection.recv_bytes())


@dataclass
class Server(AbstractContextManager["Server"]):
    """Plays `script` while it is entered; errors of the script are raised on exit.

    Attributes:
        send: how a message is brought to the trainer.
        updates: what each round's `train` was answered with.
        scores: what each `evaluate` was answered with, by order.
    """

    folder: RunFolder
    script: Callable[[Server], None] | None = None
    plan: SitePlan = PLAN
    send: Callable[[RunFolder, bytes], Frame] = send
    updates: list[Frame] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    manifest: Manifest | None = None
    problem: BaseException | None = None

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.join(5.0 if kind else 60.0)
        if kind is None:
            assert not self._thread.is_alive(), "the script did not end"
            if self.problem is not None:
                raise self.problem

    def _play(self) -> None:
        try:
            (self.script or Server.whole_run)(self)
        except BaseException as error:
            self.problem = error

    def ask(self, kind: str, params: Mapping[str, Tensor] | None = None, **config: Any) -> Frame:
        """One message of this run."""
        return self.send(self.folder, self.encode(kind, params, **config))

    def encode(self, kind: str, params: Mapping[str, Tensor] | None = None, **config: Any) -> bytes:
        return encode(kind, pack(arrays=params, config={"run": self.plan.run, **config}))

    def begin(self) -> Params:
        """Plan, initial and setup; returns the first global."""
        planned = config_of(self.good(self.ask(messages.PLAN)))
        assert planned["client"] == self.plan.client
        self.manifest = Manifest.from_json(str(planned["manifest"]))
        first = self.good(self.ask(messages.INITIAL, round=0))
        static = first.array_records.get("static")
        self.good(
            self.ask(
                messages.SETUP,
                params_of(static) if static else {},
                manifest=self.manifest.to_json(),
            )
        )
        return params_of(first.array_records["arrays"])

    def task(self, number: int, **given: Any) -> RoundTask:
        assert self.manifest is not None
        return RoundTask(
            run=self.plan.run,
            round=number,
            num_rounds=self.plan.num_rounds,
            attempt=1,
            manifest=self.manifest.hash,
            steps=self.plan.steps,
            epochs=self.plan.epochs,
            carry=self.plan.carry,
            seed=self.plan.seed,
            **given,
        )

    def train_frame(self, number: int, params: Params, **given: Any) -> bytes:
        return encode(
            messages.TRAIN, pack(arrays=params, config=self.task(number, **given).record())
        )

    def train(self, number: int, params: Params, **given: Any) -> Params:
        """One round; returns the update."""
        frame = self.send(self.folder, self.train_frame(number, params, **given))
        content = self.good(frame)
        assert config_of(content)["round"] == number
        self.updates.append(frame)
        return params_of(content.array_records["arrays"])

    def evaluate(self, number: int, params: Params) -> dict[str, Any]:
        frame = self.ask(
            messages.EVALUATE,
            params,
            round=number,
            manifest=self.manifest.hash if self.manifest else "",
        )
        content = self.good(frame)
        assert config_of(content)["round"] == number
        self.scores.append(dict(metrics_of(content)))
        return self.scores[-1]

    def finish(self, params: Params, number: int, reason: str = "done") -> None:
        self.good(self.ask(messages.FINISH, params, round=number, reason=reason))

    def whole_run(self, *, evaluate: bool = True) -> None:
        """Every round's update is the next global."""
        params = self.begin()
        for number in range(1, self.plan.num_rounds + 1):
            if evaluate:
                self.evaluate(number - 1, params)
            params = self.train(number, params)
        if evaluate:
            self.evaluate(self.plan.num_rounds, params)
        self.finish(params, self.plan.num_rounds)

    @staticmethod
    def good(frame: Frame) -> Any:
        assert frame.error is None, frame.error
        return frame.content


def trained(frame: Frame) -> dict[str, Any]:
    """Metrics of an update."""
    return dict(metrics_of(frame.content))


def planned(folder: RunFolder, **given: Any) -> SitePlan:
    """Write a plan into the folder."""
    plan = replace(PLAN, **given)
    folder.write_plan(plan)
    return plan
