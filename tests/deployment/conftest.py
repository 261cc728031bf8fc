"""One SuperLink with TLS and two sites for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.parts import Deployment, placed
from tests.deployment.runs import Sites


@pytest.fixture(scope="module")
def made() -> Iterator[Deployment]:
    with placed("kills-", tls=True) as deployment:
        try:
            deployment.up()
            yield deployment
        finally:
            remaining = deployment.close()
        assert remaining == []
        assert list(Path(deployment.env["TMPDIR"]).iterdir()) == []


@pytest.fixture(scope="module")
def sites(made: Deployment) -> Iterator[Sites]:
    joined = Sites(made)
    yield joined
    joined.end()
