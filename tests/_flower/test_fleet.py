"""Which requests are signed by a node that the server knows, with Flower's own signing client."""

from __future__ import annotations

from base64 import b64encode
from datetime import timedelta
from types import SimpleNamespace

import pytest
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    public_key_to_bytes,
    sign_message,
)

from fedtune._flower.fleet import known_nodes


class Links:
    """Flower's state of a server that knows some keys."""

    def __init__(self, *keys):
        self.keys = keys

    def get_node_id_by_public_key(self, key):
        return 7 if key in self.keys else None


@pytest.fixture(scope="module")
def pair():
    private, public = generate_key_pairs()
    return private, public_key_to_bytes(public)


def headers(pair, *, age_s=0.0, signed="", **changed):
    """As a node makes them; `changed` replaces one."""
    private, public = pair
    stamp = (now() - timedelta(seconds=age_s)).isoformat()
    signature = sign_message(private, (signed or stamp).encode("ascii"))
    made = {
        "flwr-public-key": b64encode(public),
        "flwr-timestamp": stamp.encode(),
        "flwr-signature": b64encode(signature),
    }
    made |= {f"flwr-{name.replace('_', '-')}": value for name, value in changed.items()}
    return [(name.encode(), value) for name, value in made.items() if value is not None]


def knows(found, *keys):
    app = SimpleNamespace(
        state=SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: Links(*keys)))
    )
    return known_nodes(app)(found)


def test_a_known_node_is_known(pair):
    assert knows(headers(pair), pair[1])
    assert knows(headers(pair, age_s=300), pair[1])


def test_an_unknown_node_is_not(pair):
    assert not knows(headers(pair))
    assert not knows(headers(pair), b"another key")


def test_the_key_of_a_known_node_without_its_signature(pair):
    other, _ = generate_key_pairs()
    assert not knows(headers((other, pair[1])), pair[1])
    assert not knows(headers(pair, signed="2020-01-01"), pair[1])


@pytest.mark.parametrize("age_s", [310, -10])
def test_a_signature_of_another_time(pair, age_s):
    assert not knows(headers(pair, age_s=age_s), pair[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"public_key": None},
        {"signature": None},
        {"timestamp": None},
        {"public_key": b"***"},
        {"signature": b""},
        {"timestamp": b"noon"},
        {"timestamp": b"\xff"},
        {"timestamp": b"2026-01-01"},
    ],
)
def test_half_a_signature(pair, changed):
    assert not knows(headers(pair, **changed), pair[1])
