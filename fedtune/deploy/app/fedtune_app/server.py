"""The server of a run."""

from fedtune._flower.objects import hasten_server
from fedtune.server.deployed import app

__all__ = ["app"]

hasten_server()
