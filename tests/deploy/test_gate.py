from __future__ import annotations

import asyncio
import json
import os

import pytest

from fedtune.deploy import bodies
from fedtune.deploy.admission import PEER, Rules
from fedtune.deploy.gate import GATE, Gate

SITE, SERVER = ("192.0.2.7", 5000), ("192.0.2.1", 8000)
HERE, LOOPBACK = ("127.0.0.1", 5000), ("127.0.0.1", 8000)
OWNER, OTHER = 1000, 1001
CONTROL, FLEET = "/v1/control/start-run", "/v1/fleet/push-object"


class Caller:
    def __init__(self, uid):
        self._uid = uid
        self.is_known = uid is not None

    @property
    def uid(self):
        if self._uid is None:
            raise LookupError("it has gone")
        return self._uid


def scope_of(path, client=HERE, server=LOOPBACK, *, uid=OWNER, headers=(), kind="http"):
    return {
        "type": kind,
        "path": path,
        "client": client,
        "server": server,
        "headers": [(b"host", b"127.0.0.1:8000"), *headers],
        "state": {PEER: Caller(uid)},
    }


def pass_through(scope, *, bound="127.0.0.1", names=(), owner=OWNER, pieces=(b"",), known=False):
    """What the caller gets, its detail, and the body that the application behind has read."""
    sent, read = [], []
    left = list(pieces)

    async def behind(scope, receive, send):
        more = scope["type"] == "http"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            read.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        if not left:
            await asyncio.sleep(60)
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(left) or piece == b"..."}

    async def send(message):
        sent.append(message)

    rules = Rules(bound, ("localhost", bound, *names), owner)
    asyncio.run(Gate(behind, rules, lambda scope: known)(scope, receive, send))
    status = sent[0].get("status", sent[0].get("code"))
    detail = (
        json.loads(sent[1]["body"]).get("detail", "") if len(sent) > 1 and sent[1]["body"] else ""
    )
    return status, detail, read


def ask(path, client=HERE, server=LOOPBACK, *, uid=OWNER, headers=(), kind="http", **gate):
    return pass_through(
        scope_of(path, client, server, uid=uid, headers=headers, kind=kind), **gate
    )[0]


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/health"])
def test_a_site_reaches_what_a_site_needs(path):
    assert ask(path, SITE, SERVER) == 200


@pytest.mark.parametrize(
    "path",
    [
        CONTROL,
        "/v1/runtime/acquire-task",
        "/",
        "/docs",
        GATE,
        "/v1/fleet",
        "/v1/fleet/../control/start-run",
        "//v1/control/start-run",
    ],
)
def test_a_site_reaches_nothing_else(path):
    assert ask(path, SITE, SERVER) == 403
    assert ask(path, uid=OTHER) == 403  # of another user, here
    assert ask(path) == 200


@pytest.mark.parametrize(
    ("client", "server", "bound", "status"),
    [
        (HERE, LOOPBACK, "127.0.0.1", 200),
        (HERE, LOOPBACK, "localhost", 200),
        (("::1", 1, 0, 0), ("::1", 8000, 0, 0), "::", 200),
        (("::ffff:127.0.0.1", 1), ("::ffff:127.0.0.1", 8000), "::", 200),
        # Where loopback is not served, the address that was called is the only way.
        (("192.0.2.1", 1), SERVER, "192.0.2.1", 200),
        (("192.0.2.1", 1), SERVER, "fed.example.org", 200),
        (("192.0.2.1", 1), SERVER, "0.0.0.0", 403),
        (("2001:db8::1", 1), ("2001:db8::1", 8000), "::", 403),
        (("2001:db8::1", 1), ("::1", 8000), "::", 403),
        (SITE, SERVER, "192.0.2.1", 403),
        (None, SERVER, "192.0.2.1", 403),
        (SITE, None, "192.0.2.1", 403),
        (("unix", 0), SERVER, "192.0.2.1", 403),
    ],
)
def test_only_this_machine_reaches_all(client, server, bound, status):
    host = (b"host", f"[{server[0]}]:8000".encode() if server else b"")
    scope = scope_of(CONTROL, client, server)
    scope["headers"] = [host]
    assert pass_through(scope, bound=bound)[0] == status


@pytest.mark.parametrize(
    ("owner", "uid", "status"),
    [(1000, 1000, 200), (1000, 0, 200), (1000, 1001, 403), (0, 0, 200), (0, 1000, 403)],
)
def test_only_the_user_of_the_superlink_and_root_reach_all(owner, uid, status):
    assert ask(CONTROL, uid=uid, owner=owner) == status
    assert ask(FLEET, uid=uid, owner=owner) == 200


def test_who_cannot_be_told_is_refused_with_the_reason():
    status, detail, _ = pass_through(scope_of(CONTROL, uid=None))
    assert status == 403
    assert detail == "fedtune: cannot tell whose program asks (it has gone), so nobody may."


def test_without_a_noted_connection_it_is_looked_up():
    scope = scope_of(CONTROL)
    del scope["state"]
    assert pass_through(scope, owner=os.geteuid())[0] == 403  # there is no such connection


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:8000", 200),
        (b"localhost:9000", 200),  # through a forwarded port
        (b"LOCALHOST", 200),
        (b"fed.example.org:8000", 200),
        (b"a.hosp.example:8000", 200),
        (b"evil.example:8000", 403),
        (b"a.b.hosp.example", 403),
        (b"hosp.example", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"127.0.0.2:8000", 403),
        (b"[::1]:8000", 403),
        (b"", 403),
    ],
)
def test_a_page_whose_name_is_rebound_to_this_machine_is_refused(host, status):
    scope = scope_of(CONTROL)
    scope["headers"] = [(b"host", host)]
    names = ("fed.example.org", "*.hosp.example")
    assert pass_through(scope, names=names)[0] == status
    scope["path"] = "/health"
    assert pass_through(scope, names=names)[0] == 200


def test_no_host_two_hosts_and_a_page_are_refused():
    bare = scope_of(CONTROL)
    bare["headers"] = []
    assert pass_through(bare)[0] == 403
    assert ask(CONTROL, headers=[(b"host", b"evil.example")]) == 403
    assert ask(CONTROL, headers=[(b"origin", b"http://127.0.0.1:8000")]) == 403


@pytest.mark.parametrize(
    ("length", "known", "status"),
    [
        (bodies.STRANGER, False, 200),
        (bodies.STRANGER + 1, False, 413),
        (bodies.STRANGER + 1, True, 200),
        (bodies.KNOWN, True, 200),
        (bodies.KNOWN + 1, True, 413),
    ],
)
def test_what_is_announced_as_too_long_is_not_read(length, known, status):
    scope = scope_of(FLEET, headers=[(b"content-length", str(length).encode())])
    got, _, read = pass_through(scope, known=known)
    assert got == status
    assert (read == []) == (status == 413)


def test_what_announces_no_length_is_counted():
    chunked = [(b"transfer-encoding", b"chunked")]
    piece = bytes(bodies.KNOWN // 4)
    assert pass_through(scope_of(FLEET, headers=chunked))[::2] == (413, [])
    scope = scope_of(FLEET, headers=chunked)
    assert pass_through(scope, known=True, pieces=[piece] * 4)[0] == 200
    status, detail, read = pass_through(scope, known=True, pieces=[piece] * 5)
    assert (status, len(read)) == (413, 4)
    assert detail == f"fedtune: expected at most {bodies.KNOWN} bytes."


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(bodies, "PIECE_S", 0.05)
    assert pass_through(scope_of(FLEET), pieces=[b"..."])[0] == 408


def test_what_is_not_for_sites_is_not_bounded():
    """A run's own processes are of the same user; the app that submit sends may be long."""
    headers = [(b"content-length", str(bodies.KNOWN * 2).encode())]
    assert ask(CONTROL, headers=headers) == 200


def test_a_websocket_is_closed_and_the_lifespan_passes():
    assert ask("/v1/runtime/x", kind="websocket") == 1008
    assert ask("", kind="lifespan") == 200
