"""Who may ask a SuperLink for what is not for sites: to start a run is to run a program there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fedtune.deploy.peer import Peer, address_of

__all__ = ["PEER", "Rules", "Scope", "header", "is_for_sites", "peer_state"]

FOR_SITES = ("/v1/fleet/", "/health")
PEER = "fedtune.peer"  # in the state of a request: the Peer of its connection
ROOT = 0
ANY = ("0.0.0.0", "::", "")  # then loopback is served, too

Scope = MutableMapping[str, Any]  # of ASGI


def is_for_sites(path: str) -> bool:
    """Whether the sites need this path."""
    return ".." not in path and path.startswith(FOR_SITES)


def header(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header; `name` in lower case."""
    return [value for key, value in scope.get("headers", ()) if key == name]


@dataclass(frozen=True)
class Rules:
    """What a request needs that is not for sites.

    Attributes:
        bound: where the SuperLink listens.
        names: how it may be called; `*.` stands for one label.
        uid: the user of the SuperLink.
    """

    bound: str
    names: tuple[str, ...]
    uid: int

    @classmethod
    def here(cls, bound: str, names: Iterable[str] = ()) -> Rules:
        """For a SuperLink of this process, whose certificate is for `names`."""
        known = ("localhost", socket.gethostname(), bound, *names)
        return cls(bound, tuple(name.lower() for name in known), os.geteuid())

    def refusal(self, scope: Scope) -> str | None:
        """Why the caller may not, in one line, or None."""
        client, server = scope.get("client"), scope.get("server")
        if not client or not server or not self._is_near(client[0], server[0]):
            return (
                "only programs on the SuperLink's own host may ask for this, at the address that "
                "fedtune up tells"
            )
        return self._foreign_page(scope, server[0]) or self._foreign_user(scope)

    @staticmethod
    def takes_long(scope: Scope) -> bool:
        """Whether `refusal` would have to look up who calls."""
        peer = _peer(scope)
        return peer is None or not peer.is_known

    def _is_near(self, client: str, server: str) -> bool:
        """Whether the caller may be on this machine; where loopback is served, by that alone."""
        try:
            caller, called = address_of(client), address_of(server)
        except ValueError:
            return False
        return caller.is_loopback or (caller == called and self.bound not in ANY)

    def _foreign_page(self, scope: Scope, called: str) -> str | None:
        """A browser on this host that shows somebody else's page is this host's user, too."""
        if header(scope, b"origin"):
            return "no page of a browser may ask for this"
        hosts = [_name(value.decode("latin-1")) for value in header(scope, b"host")]
        if len(hosts) == 1 and (_is_address(hosts[0], called) or self._is_known(hosts[0])):
            return None
        return f"{', '.join(hosts) or 'no name'} is no name of this SuperLink; call it 127.0.0.1"

    def _is_known(self, name: str) -> bool:
        parent = f"*.{name.partition('.')[2]}"
        return name in self.names or parent in self.names

    def _foreign_user(self, scope: Scope) -> str | None:
        try:
            uid = (_peer(scope) or Peer(scope["client"][:2], scope["server"][:2])).uid
        except LookupError as unknown:
            return f"cannot tell whose program asks ({unknown.args[0]}), so nobody may"
        if uid in (self.uid, ROOT):
            return None
        owner = "root" if self.uid == ROOT else f"uid {self.uid}"
        others = "" if self.uid == ROOT else ", and root"
        return (
            f"only the user who runs fedtune up ({owner}){others} may ask for this, received uid "
            f"{uid}. Run submit, status, stop and logs as that user"
        )


def peer_state(client: tuple[str, int], server: tuple[str, int]) -> dict[str, Any]:
    """State of the requests of a connection: who is at its other end."""
    return {PEER: Peer(client, server)}


def _peer(scope: Scope) -> Peer | None:
    found: Peer | None = scope.get("state", {}).get(PEER)
    return found


def _name(host: str) -> str:
    """The value of a Host header without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_address(name: str, address: str) -> bool:
    try:
        return address_of(name) == address_of(address)
    except ValueError:
        return False
