"""A node that was killed is gone at once.

Flower believes in a node for up to 60 s after its last sign of life: so long a round waits for its
reply, and so long a node that starts with the same key is refused. So a node writes down who it is,
and the next one in the same folder reports its end.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["report_predecessor"]

RECORD = "node.json"
# A node that is back before the ServerApp has looked would leave it waiting for a lost reply.
SEEN_S = 2.0

log = logging.getLogger(__name__)


def report_predecessor(loop: ModuleType, folder: Path) -> None:
    """Let `loop`, Flower's SuperNode, do so; `folder` is private to the site."""
    from flwr.supernode import fleet_http_connection as fleet

    connect, make_keys = vars(loop)["http_request_response"], vars(fleet)["generate_key_pairs"]
    record = folder / RECORD

    @contextmanager
    def connected(
        address: str, insecure: bool, certificates: Any, keys: Any, *others: Any
    ) -> Iterator[Any]:
        _report(record, address, insecure, certificates, keys)
        own = keys or make_keys()
        vars(fleet)["generate_key_pairs"] = lambda: own
        try:
            with connect(address, insecure, certificates, keys, *others) as connection:
                _write(record, connection[0], None if keys else own[0])
                yield connection
        finally:
            record.unlink(missing_ok=True)  # it has told the server itself

    vars(loop)["http_request_response"] = connected


def _write(record: Path, node: int, key: Any) -> None:
    """Who this node is; the key is needed where it is not the site's own."""
    from flwr.supercore.primitives.asymmetric import private_key_to_bytes

    text = "" if key is None else private_key_to_bytes(key).decode()
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        json.dump({"node": str(node), "key": text}, handle)


def _report(record: Path, address: str, insecure: bool, certificates: Any, keys: Any) -> None:
    import httpx
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    try:
        known = json.loads(record.read_text())
        private = bytes_to_private_key(known["key"].encode()) if known["key"] else keys[0]
        request = DeactivateNodeRequest(node_id=int(known["node"]))
    except (OSError, ValueError, TypeError, KeyError):
        return  # ended in order, or was killed before it had joined
    record.unlink()
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    try:
        with FleetHttpClient.from_server_address(
            address, insecure, certificates, interceptors=interceptors
        ) as client:
            client.DeactivateNode(request)
    except httpx.HTTPError:  # the server has noticed, has forgotten it, or is gone
        return
    log.warning("node %s was killed; the server knows now", known["node"])
    time.sleep(SEEN_S)
