from __future__ import annotations

import pytest

from fedtune.deploy.certs import make_certs

APP = """
import threading
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@server.main()
def main(grid, context):
    print("here we are", flush=True)
    if context.run_config["mark"]:
        Path(context.run_config["mark"]).touch()
    if context.run_config["mode"] == "raise":
        raise ValueError("nobody joined")
    threading.Event().wait()
"""
PROJECT = """
[project]
name = "waits"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "waits.app:server"
clientapp = "waits.app:client"
[tool.flwr.app.config]
mode = "wait"
mark = ""
"""


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    """Folders of all roles, for sites a and b."""
    directory = tmp_path_factory.mktemp("certs") / "certs"
    make_certs(directory, ["a", "b"], hosts=["fed.example.org"])
    return directory


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    """A Flower app whose server never ends by itself."""
    directory = tmp_path_factory.mktemp("app")
    (directory / "waits").mkdir()
    (directory / "waits" / "__init__.py").touch()
    (directory / "waits" / "app.py").write_text(APP)
    (directory / "pyproject.toml").write_text(PROJECT)
    return directory


@pytest.fixture(autouse=True)
def _own_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower-home"))
