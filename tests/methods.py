"""Methods of one part, for tests of that part."""

from __future__ import annotations

from fedtune.strategies import METHODS, Method
from fedtune.strategies.method import Part

__all__ = ["method_of", "named"]


def method_of(part: Method | Part | None) -> Method:
    """A method of this part alone; what is a method already, or FedAvg."""
    if part is None:
        return Method()
    return part if isinstance(part, Method) else Method.of(part)


def named(name: str) -> Method:
    """One of `METHODS` alone, by its defaults."""
    return Method.of(METHODS[name]())
