"""A forwarding HTTP proxy in a thread, to which all names lead to this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

__all__ = ["Forwarding", "forwarding"]


class Forwarding:
    """What it was asked, and how it answers.

    Attributes:
        asked: `METHOD TARGET` of each request.
        heads: the heads of the requests.
        answer: sent instead of forwarding, such as `403 Forbidden`.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self.asked: list[str] = []
        self.heads: list[str] = []
        self.answer = ""

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(65536)):
                    return
                head += data
            line, rest = head.split(b"\r\n", 1)
            method, target, version = line.split()
            self.asked.append(f"{method.decode()} {target.decode()}")
            self.heads.append(head.decode("latin-1"))
            if self.answer:
                end = "\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                client.sendall(f"HTTP/1.1 {self.answer}{end}".encode())
                return
            connect = method == b"CONNECT"
            place = target if connect else target.split(b"/")[2]
            with socket.create_connection(("127.0.0.1", int(place.rpartition(b":")[2]))) as server:
                if connect:
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                else:
                    path = b"/" + target.split(b"/", 3)[3]
                    first = b" ".join([method, path, version])
                    server.sendall(first + b"\r\nConnection: close\r\n" + rest)
                back = threading.Thread(target=_pipe, args=(server, client), daemon=True)
                back.start()
                _pipe(client, server)
                back.join()


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def forwarding() -> Iterator[Forwarding]:
    """One that forwards, until the block is left."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Forwarding(listener)
        threading.Thread(target=proxy.serve, daemon=True).start()
        yield proxy
