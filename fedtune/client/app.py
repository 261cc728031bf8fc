"""The ClientApp of a simulation: Flower messages in, a `Worker` does the work, replies out."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.adapters import Manifest
from fedtune.client.worker import Worker
from fedtune.transport.messages import RoundTask, pack
from fedtune.transport.records import config_of, params_of, to_arrays

__all__ = ["client_app"]


def client_app(get_worker: Callable[[], Worker]) -> ClientApp:
    """A Flower ClientApp; `get_worker` returns this process's worker."""
    app = ClientApp()

    def name_of(context: Context) -> str:
        return get_worker().names[int(context.node_config["partition-id"])]

    @app.query("initial")
    def initial(message: Message, context: Context) -> Message:
        worker = get_worker()
        params, static = worker.initial()
        content = pack(arrays=params, config={"manifest": worker.manifest.to_json()})
        if static:
            content["static"] = to_arrays(static)
        return Message(content, reply_to=message)

    @app.query("setup")
    def setup(message: Message, context: Context) -> Message:
        manifest = Manifest.from_json(str(config_of(message.content)["manifest"]))
        get_worker().set_up(manifest, params_of(message.content.array_records["arrays"]))
        return Message(pack(config={"client": name_of(context)}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = RoundTask.of(message.content)
        params = params_of(message.content.array_records["arrays"])
        result = get_worker().train_round(name_of(context), task, params)
        content = pack(
            arrays=result.params,
            metrics={
                "num-examples": result.num_examples,
                "num-tokens": result.num_tokens,
                "num-steps": result.num_steps,
                "train-loss": result.train_loss,
                "train-s": result.train_s,
            },
            config={"client": name_of(context), "round": task.round, "manifest": task.manifest},
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        params = params_of(message.content.array_records["arrays"])
        metrics, num_examples = get_worker().evaluate(params)
        content = pack(
            metrics={**metrics, "num-examples": num_examples},
            config={
                "client": name_of(context),
                "round": int(str(config_of(message.content)["round"])),
            },
        )
        return Message(content, reply_to=message)

    return app
