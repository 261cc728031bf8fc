"""The ClientApp of a simulation: Flower messages in, a `Worker` does the work, replies out."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.client import replies
from fedtune.client.codec_link import CodecLink
from fedtune.client.replies import Sent
from fedtune.client.worker import Worker
from fedtune.transport.coded_records import resend
from fedtune.transport.messages import EvaluateTask, PlanTask, RoundTask, arrays_of

__all__ = ["client_app"]

TRANSPORT = "transport"  # in a client's directory: what coded transport keeps
ClientAppCallable = Callable[[Message, Context], Message]


def client_app(get_worker: Callable[[], Worker]) -> ClientApp:
    """A Flower ClientApp; `get_worker` returns this process's worker."""

    def name_of(context: Context) -> str:
        return get_worker().names[int(context.node_config["partition-id"])]

    def coded(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Decode what comes and encode the reply, where the server does."""
        worker, name = get_worker(), name_of(context)
        link = CodecLink(worker.work_dir / name / TRANSPORT, lambda: worker.own(name))
        opened = link.open(message.content)
        if opened is None:
            return Message(resend(), reply_to=message)
        message.content = opened.content
        reply = call_next(message, context)
        if reply.has_content():
            reply.content = opened.seal(reply.content)
        return reply

    app = ClientApp(mods=[coded])

    @app.query("plan")
    def plan(message: Message, context: Context) -> Message:
        worker, name = get_worker(), name_of(context)
        content = replies.planned(
            name,
            evaluates=True,
            manifest=worker.manifest_of(name),
            declared=worker.declare(name, PlanTask.of(message.content)),
        )
        return Message(content, reply_to=message)

    @app.query("initial")
    def initial(message: Message, context: Context) -> Message:
        worker = get_worker()
        return Message(replies.initial(*worker.initial(), worker.manifest), reply_to=message)

    @app.query("setup")
    def setup(message: Message, context: Context) -> Message:
        manifest, static = replies.manifest_of(message.content), arrays_of(message.content)
        get_worker().set_up(name_of(context), manifest, static)
        return Message(replies.set_up(name_of(context)), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name, task = name_of(context), RoundTask.of(message.content)
        result = get_worker().train_round(name, task, Sent.of(message.content))
        return Message(replies.trained(name, task, result), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        name, task = name_of(context), EvaluateTask.of(message.content)
        score = get_worker().evaluate(name, task, Sent.of(message.content))
        return Message(replies.evaluated(name, task.round, score), reply_to=message)

    @app.query("finish")
    def finish(message: Message, context: Context) -> Message:
        return Message(replies.finished(name_of(context)), reply_to=message)

    return app
