"""Flower's simulation in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

__all__ = ["quiet_flower", "run_simulation"]


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
