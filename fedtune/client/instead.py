"""Methods of one Trainer replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

__all__ = ["instead"]


@contextmanager
def instead(trainer: Trainer, **methods: Callable[..., Any]) -> Iterator[None]:
    """`trainer` has these methods inside; those that a script has given it come back after."""
    own = {name: vars(trainer)[name] for name in methods if name in vars(trainer)}
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(trainer).pop(name, None)
        vars(trainer).update(own)
