from __future__ import annotations

import pytest

from fedtune.deploy.certs import make_certs


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    """Folders of all roles, for sites a and b."""
    directory = tmp_path_factory.mktemp("certs") / "certs"
    make_certs(directory, ["a", "b"], hosts=["fed.example.org"])
    return directory


@pytest.fixture(autouse=True)
def _own_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower-home"))
