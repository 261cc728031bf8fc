"""Against the kernel's own tables, with real connections."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from fedtune.deploy import peer
from fedtune.deploy.peer import Peer
from tests.deploy.users import OTHER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tables are Linux's")


def ends(accepted):
    return accepted.getpeername()[:2], accepted.getsockname()[:2]


@pytest.mark.parametrize(
    ("listens", "calls", "address"),
    [
        (socket.AF_INET, socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, socket.AF_INET6, "::ffff:127.0.0.1"),
        (socket.AF_INET6, socket.AF_INET6, "::1"),
        (socket.AF_INET6, socket.AF_INET, "127.0.0.1"),
    ],
)
def test_the_user_of_each_kind_of_connection(listens, calls, address):
    any_ = "127.0.0.1" if listens == socket.AF_INET else "::"
    both = listens == socket.AF_INET6
    server = socket.create_server((any_, 0), family=listens, dualstack_ipv6=both)
    with server, socket.socket(calls) as client:
        client.connect((address, server.getsockname()[1]))
        accepted, _ = server.accept()
        with accepted:
            assert Peer(*ends(accepted)).uid == os.geteuid()


@pytest.fixture
def connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with client, accepted:
            yield client, accepted


def test_a_connection_that_its_program_has_closed_is_not_roots(connection):
    """The kernel shows root for sockets that nobody has any more, those of other users too."""
    client, accepted = connection
    client.close()
    with pytest.raises(LookupError, match="not one of this machine, or has been closed"):
        _ = Peer(*ends(accepted)).uid


def test_a_connection_that_is_half_closed_is_nobodys(connection):
    client, accepted = connection
    client.shutdown(socket.SHUT_WR)
    with pytest.raises(LookupError):
        _ = Peer(*ends(accepted)).uid


def test_it_is_looked_up_once(connection, monkeypatch):
    _, accepted = connection
    known = Peer(*ends(accepted))
    assert not known.is_known
    assert known.uid == os.geteuid()
    assert known.is_known
    monkeypatch.setattr(peer, "_tables", lambda: pytest.fail("looked again"))
    assert known.uid == os.geteuid()


def test_where_there_are_no_tables_it_is_unknown(connection, monkeypatch, tmp_path):
    _, accepted = connection
    monkeypatch.setattr(peer, "PROC", tmp_path)
    with pytest.raises(LookupError, match="tcp6: No such file or directory"):
        _ = Peer(*ends(accepted)).uid


@pytest.mark.parametrize(("map_", "is_told"), [("0 0 4294967295", True), ("0 1000 1", False)])
def test_a_number_that_stands_for_many_users_is_nobodys(
    connection, monkeypatch, tmp_path, map_, is_told
):
    """In a namespace of users all who are not known in it look like one."""
    _, accepted = connection
    (tmp_path / "map").write_text(f"   {map_}\n")
    (tmp_path / "overflow").write_text(f"{os.geteuid()}\n")
    monkeypatch.setattr(peer, "UID_MAP", tmp_path / "map")
    monkeypatch.setattr(peer, "OVERFLOW", tmp_path / "overflow")
    if is_told:
        assert Peer(*ends(accepted)).uid == os.geteuid()
        return
    with pytest.raises(LookupError, match="stands for many users"):
        _ = Peer(*ends(accepted)).uid


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
def test_another_user_is_told_from_root():
    with socket.create_server(("127.0.0.1", 0)) as server:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setuid(OTHER)
                held = socket.create_connection(server.getsockname())
                os.close(write)
                os.read(read, 1)
                held.close()
            finally:
                os._exit(0)
        accepted, _ = server.accept()
        with accepted:
            assert Peer(*ends(accepted)).uid == OTHER
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)
