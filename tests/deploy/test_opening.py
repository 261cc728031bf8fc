"""Sites are let in once their keys are known."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.opening import OPENED, Opening


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def ask(app: Opening, path: str | None) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "lifespan"} if path is None else {"type": "http", "path": path}
    asyncio.run(app(scope, None, send))  # type: ignore[arg-type]
    return int(sent[0]["status"])


def test_sites_wait_until_the_keys_are_known_and_nobody_else_does(tmp_path: Path) -> None:
    app = Opening(behind, str(tmp_path / "open"))
    activate = "/v1/fleet/activate-node"
    for _ in range(2):
        assert ask(app, activate) == 503
        assert ask(app, "/v1/control/list-runs") == ask(app, "/health") == ask(app, None) == 200
    (tmp_path / "open").touch()
    assert ask(app, activate) == 200
    (tmp_path / "open").unlink()  # it has been open
    assert ask(app, activate) == 200


def test_without_keys_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OPENED, raising=False)
    assert ask(Opening(behind), "/v1/fleet/activate-node") == 200
