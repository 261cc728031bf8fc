from __future__ import annotations

import asyncio

import pytest

from fedtune.deploy.gate import GATE, Gate

SITE, SERVER = ("192.0.2.7", 5000), ("192.0.2.1", 8000)


def ask(path, client=SITE, server=SERVER, kind="http"):
    """Status that the caller gets; 200 comes from the application behind the gate."""
    sent = []

    async def behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "client": client, "server": server}
    asyncio.run(Gate(behind)(scope, None, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/health", GATE])
def test_a_site_reaches_what_a_site_needs(path):
    assert ask(path) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/",
        "/docs",
        "/v1/fleet",
        "/v1/fleet/../control/start-run",
        "//v1/control/start-run",
    ],
)
def test_a_site_reaches_nothing_else(path):
    assert ask(path) == 403


@pytest.mark.parametrize(
    ("client", "server"),
    [
        (("127.0.0.1", 1), ("127.0.0.1", 8000)),
        (("::1", 1, 0, 0), ("::1", 8000, 0, 0)),
        (("::ffff:127.0.0.1", 1), ("::ffff:127.0.0.1", 8000)),
        (("192.0.2.1", 1), ("192.0.2.1", 8000)),
    ],
)
def test_this_machine_reaches_all(client, server):
    assert ask("/v1/control/start-run", client, server) == 200


@pytest.mark.parametrize(
    ("client", "server"),
    [(None, SERVER), (SITE, None), (("unix", 0), SERVER), (("2001:db8::1", 1), ("::1", 8000))],
)
def test_who_is_not_known_to_be_here_is_not(client, server):
    assert ask("/v1/control/start-run", client, server) == 403


def test_a_websocket_is_closed_and_the_lifespan_passes():
    assert ask("/v1/runtime/x", kind="websocket") == 1008
    assert ask("", kind="lifespan") == 200
