"""One SuperLink with TLS and two sites for all tests of a module."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.parts import Deployment
from tests.deployment.runs import Sites


@pytest.fixture(scope="module")
def made() -> Iterator[Deployment]:
    with (
        tempfile.TemporaryDirectory(prefix="kills-") as directory,
        tempfile.TemporaryDirectory(prefix="ft-") as temporary,
    ):
        deployment = Deployment(Path(directory), Path(temporary), tls=True)
        try:
            deployment.up()
            yield deployment
        finally:
            remaining = deployment.close()
        assert remaining == []
        assert list(Path(temporary).iterdir()) == []


@pytest.fixture(scope="module")
def sites(made: Deployment) -> Iterator[Sites]:
    joined = Sites(made)
    yield joined
    joined.end()
