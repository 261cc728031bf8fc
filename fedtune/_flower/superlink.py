"""Flower's SuperLink in this process, with its application behind another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from fedtune._flower.superexec import launch_runs_once

__all__ = ["run_superlink"]


def run_superlink(
    wrap: Callable[[Any, str, str | None], Any], protocol: type[asyncio.Protocol]
) -> None:
    """Run `flower-superlink` with the arguments of this process.

    Args:
        wrap: makes the ASGI application that is served, of Flower's own, the address it listens on
            and the file of its certificate.
        protocol: of the web server's connections.
    """
    import uvicorn

    launch_runs_once()
    serve: Callable[..., None] = uvicorn.run

    def serve_wrapped(*, app: Any, host: str, **settings: Any) -> None:
        settings |= {"proxy_headers": False, "http": protocol}  # nobody chooses their address
        serve(app=wrap(app, host, settings.get("ssl_certfile")), host=host, **settings)

    vars(uvicorn)["run"] = serve_wrapped
    (program,) = entry_points(group="console_scripts", name="flower-superlink")
    program.load()()
