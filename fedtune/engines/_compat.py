"""Every private touch of Flower, and nothing else. Tested with flwr 1.41."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

__all__ = ["client_failed", "quiet_flower", "run_simulation", "set_message_id", "task_identity"]

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


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's start-up chatter out of the terminal; warnings and errors still show."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_simulation(
    server: ServerApp, client: ClientApp, num_clients: int, backend: dict[str, Any]
) -> None:
    """Flower's simulation in this process; deprecated there, but the only programmatic way."""
    from flwr.simulation import run_simulation as flower_run_simulation

    with quiet_flower():
        flower_run_simulation(server, client, num_clients, backend_config=backend)
