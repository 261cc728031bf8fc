"""Clients without a Trainer: a script says what each of them answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune._flower.task_message import task_identity
from fedtune.adapters import Entry, Manifest
from fedtune.engines.inline import InlineGrid
from fedtune.server.app import ServerRun, server_app
from fedtune.transport.messages import RoundTask, pack
from fedtune.transport.records import params_of, to_arrays

SHAPES = {"a": (2, 3), "b": (3,)}
MANIFEST = Manifest(
    peft_type="LORA",
    base_hash="base",
    adapter_config={"peft_type": "LORA", "r": 2},
    entries={name: Entry(shape, "float32") for name, shape in SHAPES.items()},
    export={name: name for name in SHAPES},
)

# Changes the content of a good reply, or raises; (content, task) -> content.
Answer = Callable[[RecordDict, RoundTask], RecordDict]


def first_params() -> dict[str, Tensor]:
    """Zeros."""
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def good(content: RecordDict, task: RoundTask) -> RecordDict:
    """What an honest client sends."""
    return content


@dataclass
class Script:
    """Answers by client name; others are honest: they add their number to the global values.

    Attributes:
        answers: client name -> what it does with its good reply.
        tasks: every task that was handed out, as (client, task).
        initial: first global parameters, asked from one client.
        set_up_as: name that every client gives itself at set-up; by default its own.
        evaluated: first value of `b` at each evaluation.
        eval_loss: eval loss of the global parameters.
        declared: what a client says at `plan` that it can train.
        scores: what else a client says of them.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    eval_loss: Callable[[dict[str, Tensor]], float] = lambda params: 1.0
    scores: Callable[[str], dict[str, float]] = lambda client: {}
    declared: dict[str, dict[str, int]] = field(default_factory=dict)
    initial: Callable[[], dict[str, Tensor]] = first_params
    set_up_as: str | None = None
    tasks: list[tuple[str, RoundTask]] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)

    def set_up(self, name: str) -> None:
        """Called when a client is set up."""

    def app(self) -> ClientApp:
        """The ClientApp of all clients."""
        app = ClientApp()

        @app.query("plan")
        def plan(message: Message, context: Context) -> Message:
            config = {
                "client": self.set_up_as or name_of(context),
                "evaluates": name_of(context) == "client-0",
                "manifest": MANIFEST.to_json(),
                **self.declared.get(name_of(context), {}),
            }
            return Message(pack(config=config), reply_to=message)

        @app.query("initial")
        def initial(message: Message, context: Context) -> Message:
            content = pack(arrays=self.initial(), config={"manifest": MANIFEST.to_json()})
            return Message(content, reply_to=message)

        @app.query("setup")
        def setup(message: Message, context: Context) -> Message:
            name = self.set_up_as or name_of(context)
            self.set_up(name)
            return Message(pack(config={"client": name}), reply_to=message)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            name, task = name_of(context), RoundTask.of(message.content)
            self.tasks.append((name, task))
            params = params_of(message.content.array_records["arrays"])
            content = honest_reply(name, task, {k: v + number_of(name) for k, v in params.items()})
            return Message(self.answers.get(name, good)(content, task), reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            params = params_of(message.content.array_records["arrays"])
            self.evaluated.append(float(params["b"][0]))
            metrics = {"eval_loss": self.eval_loss(params), "num-examples": 5}
            metrics |= self.scores(name_of(context))
            config = {"round": message.content.config_records["config"]["round"]}
            return Message(pack(metrics=metrics, config=config), reply_to=message)

        return app


def name_of(context: Context) -> str:
    """The client that a context belongs to."""
    return f"client-{context.node_config['partition-id']}"


def number_of(name: str) -> int:
    """`client-3` -> 4."""
    return int(name.rpartition("-")[2]) + 1


def honest_reply(name: str, task: RoundTask, params: dict[str, Tensor]) -> RecordDict:
    """Every record of a good update; 10 examples and 100 tokens."""
    return pack(
        arrays=params,
        metrics={
            "num-examples": 10,
            "num-tokens": 100,
            "num-steps": 4,
            "train-loss": 2.0,
            "train-s": 0.1,
        },
        config={"client": name, "round": task.round, "manifest": task.manifest},
    )


def replaced(content: RecordDict, **tensors: Tensor | None) -> RecordDict:
    """The reply with other tensors; None removes one."""
    params = {**params_of(content.array_records["arrays"]), **tensors}
    content["arrays"] = to_arrays({k: v for k, v in params.items() if v is not None})
    return content


def counted(content: RecordDict, **metrics: Any) -> RecordDict:
    """The reply with other metrics (`_` stands for `-`); None removes one."""
    new = {**content.metric_records["metrics"]}
    new.update({name.replace("_", "-"): value for name, value in metrics.items()})
    content["metrics"] = MetricRecord({k: v for k, v in new.items() if v is not None})
    return content


def configured(content: RecordDict, **config: Any) -> RecordDict:
    """The reply with other config values."""
    content.config_records["config"].update(config)
    return content


def with_arrays(content: RecordDict, arrays: ArrayRecord | None) -> RecordDict:
    """The reply with another parameter record, or with none."""
    del content["arrays"]
    if arrays is not None:
        content["arrays"] = arrays
    return content


class ScriptedGrid(InlineGrid):
    """An inline grid with a bad network: `deliver` sees every reply before the server does."""

    def __init__(
        self,
        client: ClientApp,
        num_clients: int,
        deliver: Callable[[Message], Iterable[Message]] = lambda reply: [reply],
    ) -> None:
        super().__init__(client, num_clients)
        self._deliver = deliver

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [out for reply in super().pull_messages(message_ids) for out in self._deliver(reply)]


def serve(
    run: ServerRun, script: Script, grid_type: type[InlineGrid] = ScriptedGrid, **grid: Any
) -> ServerRun:
    """Run a ServerApp against scripted clients; the result or the error is in `run`."""
    with task_identity(1, 1):
        app = script.app()
        context = InlineGrid(app, 1)._contexts[2]
        server_app(run)(grid_type(app, run.min_clients, **grid), context)
    return run


@contextmanager
def in_a_task() -> Iterator[None]:
    """Messages can be built while entered."""
    with task_identity(1, 1):
        yield
