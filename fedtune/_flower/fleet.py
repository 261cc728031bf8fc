"""Whether a request to a SuperLink is signed by a node that it knows, told from its head alone.

Flower reads the whole request first.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

__all__ = ["known_nodes"]

NAMES = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)


def known_nodes(app: Any) -> Callable[[Iterable[tuple[bytes, bytes]]], bool]:
    """For a SuperLink's application: whether these headers were signed by a node it knows."""
    state = app.state.linkstate_factory.state

    def knows(headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = dict(headers)
        try:
            public, signature, stamp = (given[name.encode()] for name in NAMES)
            key = b64decode(public, validate=True)
            age = (now() - datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
            if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
                return False
            if state().get_node_id_by_public_key(key) is None:
                return False
            return bool(
                verify_signature(
                    bytes_to_public_key(key), stamp, b64decode(signature, validate=True)
                )
            )
        except (KeyError, ValueError, TypeError, binascii.Error):
            return False

    return knows
