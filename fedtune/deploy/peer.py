"""Whose process is at the other end of a connection on this machine. Linux only.

The kernel's tables of TCP sockets tell the user who made each of them. A socket that its program
has closed already is in there as root's, so that none but connected ones count.
"""

from __future__ import annotations

import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

__all__ = ["Endpoint", "Peer", "address_of"]

PROC = Path("/proc/self/net")
TABLES = {4: "tcp", 6: "tcp6"}  # by the version of the addresses in them
CONNECTED = "01"
OVERFLOW, UID_MAP = Path("/proc/sys/kernel/overflowuid"), Path("/proc/self/uid_map")
ALL_USERS = ["0", "0", "4294967295"]  # the map where this process is in no namespace of users
LOOKS = 3  # a table that changes while it is read may leave a socket out

Endpoint = tuple[str, int]  # address and port


class Peer:
    """The other end of one connection.

    Args:
        client: its address, as this end sees it.
        server: the address of this end.
    """

    def __init__(self, client: Endpoint, server: Endpoint) -> None:
        self._client, self._server = client, server
        self._uid: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether its user has been looked up, which takes tens of milliseconds on some hosts."""
        return self._uid is not None

    @property
    def uid(self) -> int:
        """User id of who made its socket; remembered, since a connection keeps its two ends.

        Raises:
            LookupError: it cannot be told, with the reason: it is not on this machine, it has gone,
                or this is no Linux.
        """
        if self._uid is None:
            self._uid = _uid(self._client, self._server)
        return self._uid


def address_of(text: str) -> IPv4Address | IPv6Address:
    """An address; one of IPv4 that is written as IPv6 is of IPv4. Raises ValueError."""
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _uid(client: Endpoint, server: Endpoint) -> int:
    for _ in range(LOOKS):
        for version, sockets in _tables().items():
            if version < address_of(client[0]).version:
                continue
            ends = " ".join(_written(end, version) for end in (client, server))
            row = sockets.find(f" {ends} {CONNECTED} ".encode())
            if row >= 0:
                fields = sockets[row : sockets.find(b"\n", row)].split()
                if int(fields[8]):  # its inode: a program has it
                    return _told(int(fields[6]))
    raise LookupError("the connection is not one of this machine, or has been closed")


def _told(uid: int) -> int:
    """`uid`, unless it may stand for all users that a namespace does not know."""
    if UID_MAP.read_text().split() != ALL_USERS and uid == int(OVERFLOW.read_text()):
        raise LookupError(f"uid {uid} stands for many users here")
    return uid


def _tables() -> dict[int, bytes]:
    """What there is: a kernel may lack IPv6, and other systems have none."""
    found, problem = {}, ""
    for version, name in TABLES.items():
        try:
            found[version] = (PROC / name).read_bytes()
        except OSError as error:
            problem = f"{PROC / name}: {error.strerror}"
    if not found:
        raise LookupError(problem)
    return found


def _written(end: Endpoint, version: int) -> str:
    """As the kernel writes it: words of 32 bits in its own order, and the port."""
    address = address_of(end[0])
    packed = address.packed
    if version > address.version:
        packed = bytes(10) + b"\xff\xff" + packed
    words = [int.from_bytes(packed[i : i + 4], sys.byteorder) for i in range(0, len(packed), 4)]
    return "".join(f"{word:08X}" for word in words) + f":{end[1]:04X}"
