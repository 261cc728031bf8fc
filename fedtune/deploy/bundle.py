"""The Flower app that every deployment runs, and its hash, by which both sides know each other."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fedtune._flower.app_bundle import build_app, hash_app

__all__ = ["APP", "app_hash"]

APP = Path(__file__).parent / "app"


@cache
def app_hash(directory: Path = APP) -> str:
    """sha256 of the app, the same on every machine with the same fedtune."""
    return hash_app(build_app(directory))
