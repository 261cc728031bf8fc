"""A Flower `Message` in a process that is no Flower task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message

__all__ = ["client_failed", "set_message_id", "task_identity"]

CLIENT_APP_RAISED_EXCEPTION = 2  # flwr.common.constant.ErrorCode


@contextmanager
def task_identity(run_id: int, node_id: int) -> Iterator[None]:
    """Flower builds a `Message` only inside a task; this process is one while entered."""
    from flwr.supercore.task_identity import TaskIdentity

    names = ("_run_id", "_node_id", "_task_id")
    before = {name: type.__getattribute__(TaskIdentity, name) for name in names}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, run_id
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, as a SuperLink does when it is pushed."""
    vars(message.metadata)["_message_id"] = message_id


def client_failed(message: Message, error: Exception) -> Message:
    """The error reply that Flower makes of an exception in a ClientApp."""
    from flwr.app.error import Error

    return Message(Error(CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
