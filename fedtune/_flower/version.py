"""Which Flower is installed, and whether its internals are the known ones."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["TESTED", "flower_version", "is_tested"]

TESTED = ("1.41", "1.42")


def flower_version() -> str:
    """Version of the installed Flower."""
    return version("flwr")


def is_tested(flower: str) -> bool:
    """Whether the private names used here were tried with this version of Flower."""
    return ".".join(flower.split(".")[:2]) in TESTED
