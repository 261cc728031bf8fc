"""A real web server: who calls is known to the application, and nobody holds a connection."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import time

import pytest
import uvicorn

from fedtune._flower import listening
from fedtune._flower.listening import protocol
from fedtune.deploy.admission import PEER, peer_state

LIMIT_S = 0.3


async def app(scope, receive, send):
    """Answers with the user of the caller, after the whole body."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    body = str(scope["state"][PEER].uid).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of uvicorn's websockets


@pytest.fixture(params=["h11", "httptools"])
def server(request, monkeypatch):
    """Its port."""
    module = pytest.importorskip(f"uvicorn.protocols.http.{request.param}_impl")
    (name,) = [name for name in ("H11Protocol", "HttpToolsProtocol") if hasattr(module, name)]
    monkeypatch.setattr("uvicorn.protocols.http.auto.AutoHTTPProtocol", getattr(module, name))
    monkeypatch.setattr(listening, "REQUEST_S", LIMIT_S)
    config = uvicorn.Config(
        app,
        port=0,
        http=protocol(peer_state),
        lifespan="off",
        log_level="warning",
        proxy_headers=False,
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join()


def asked(link):
    link.request("GET", "/", headers={"x-forwarded-for": "192.0.2.1"})
    return int(link.getresponse().read())


def send_slowly(link, data, pause_s):
    for byte in data:
        time.sleep(pause_s)
        link.sendall(bytes([byte]))


def closed_after(link, within_s):
    """Seconds until the server closes it."""
    started = time.monotonic()
    link.settimeout(within_s)
    with contextlib.suppress(ConnectionResetError):
        assert link.recv(1) == b""
    return time.monotonic() - started


def test_the_user_is_known_for_every_request_of_a_connection(server):
    link = http.client.HTTPConnection("127.0.0.1", server)
    assert [asked(link) for _ in range(3)] == [os.geteuid()] * 3
    link.close()


def test_a_connection_on_which_nothing_is_asked_is_closed(server):
    with socket.create_connection(("127.0.0.1", server)) as link:
        assert closed_after(link, 10) >= LIMIT_S * 0.9


def test_a_request_that_comes_byte_by_byte_is_closed(server):
    closed = pytest.raises((ConnectionResetError, BrokenPipeError))
    with closed, socket.create_connection(("127.0.0.1", server)) as link:
        send_slowly(link, b"GET / HTTP/1.1\r\nhost: " + b"x" * 1000, LIMIT_S / 20)


def test_a_head_without_an_end_is_closed(server, monkeypatch):
    monkeypatch.setattr(listening, "REQUEST_S", 60.0)
    with socket.create_connection(("127.0.0.1", server)) as link:
        link.settimeout(10)
        link.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            link.sendall((b"x: " + b"y" * 8192 + b"\r\n") * 4096)


def test_a_request_that_takes_its_time_is_not_closed(server):
    """Parts of a reply come slowly over a slow line."""
    with socket.create_connection(("127.0.0.1", server)) as link:
        link.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\n")
        send_slowly(link, b"abcdef", LIMIT_S / 2)
        link.settimeout(10)
        assert link.recv(65536).startswith(b"HTTP/1.1 200")
