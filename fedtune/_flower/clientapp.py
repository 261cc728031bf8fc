"""One message in a process of its own: Flower's `run_clientapp`, with the site's own app.

The code that the server sent is compared with the site's, never installed or imported. What Flower
answers once only is noted in the task's journal, and the message is confirmed after the reply, so
that another process can do the task when this one is killed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.clientapp import ClientApp

from fedtune._flower.journal import Journal

__all__ = ["Task", "run_task"]

Response = TypeVar("Response", bound=Any)


@dataclass(frozen=True)
class Task:
    """What a forked process has to do.

    Attributes:
        address: of the SuperNode's Runtime API, on loopback.
        token: entitles to this one task.
        check: raises when the bundle it is given is not the site's app.
        load: returns the site's ClientApp.
        replied: called as soon as the SuperNode may fetch the reply.
        executor: process id of the parent.
    """

    address: str
    token: str
    journal: Journal
    check: Callable[[bytes], None]
    load: Callable[[], ClientApp]
    replied: Callable[[], None]
    executor: int


def run_task(task: Task) -> None:
    """Do one task; ends by SystemExit. Alters Flower's module: call it in a forked process."""
    from flwr.supernode.runtime import run_clientapp as flower

    def install_from_fab(bundle: bytes, **_: Any) -> None:
        task.check(bundle)

    def get_load_client_app_fn(**_: Any) -> Callable[..., ClientApp]:
        return lambda *_: task.load()

    replaced = {
        "install_from_fab": install_from_fab,
        "get_load_client_app_fn": get_load_client_app_fn,
        "RuntimeHttpClient": _client_for(task),
    }
    for name, value in replaced.items():
        getattr(flower, name)  # AttributeError: not the Flower this was written for
        setattr(flower, name, value)
    flower.run_clientapp(task.address, task.token, insecure=True, parent_pid=task.executor)


def _client_for(task: Task) -> type:
    """Flower's client of the SuperNode, with a memory in the task's journal."""
    from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse
    from flwr.proto.runtime_pb2 import (
        PullAppMessagesResponse,
        PullTaskInputResponse,
        PushTaskOutputResponse,
    )
    from flwr.supercore.runtime import RuntimeHttpClient

    journal = task.journal

    def once(name: str, answer: Response, ask: Callable[[Any], Response], request: Any) -> Response:
        known = journal.read(name)
        if known is None:
            answer = ask(request)
            journal.write(name, answer.SerializeToString())
        else:
            answer.ParseFromString(known)
        return answer

    class Client(RuntimeHttpClient):
        received: Any = None

        def PullTaskInput(self, request: Any) -> Any:
            return once(journal.INPUT, PullTaskInputResponse(), super().PullTaskInput, request)

        def PullMessages(self, request: Any) -> Any:
            return once(journal.MESSAGE, PullAppMessagesResponse(), super().PullMessages, request)

        def ConfirmMessageReceived(self, request: Any) -> Any:
            self.received = request  # Flower deletes the message's objects at once
            return ConfirmMessageReceivedResponse()

        def PushMessages(self, request: Any) -> Any:
            journal.write(journal.REPLYING)
            response = super().PushMessages(request)
            task.replied()
            return response

        def PushTaskOutput(self, request: Any) -> Any:
            # A task that is closed without a reply would make the SuperNode wait for ever.
            if not journal.has(journal.REPLYING):
                return PushTaskOutputResponse()
            if self.received is not None:
                super().ConfirmMessageReceived(self.received)
            response = super().PushTaskOutput(request)
            journal.write(journal.DONE)
            return response

    return Client
