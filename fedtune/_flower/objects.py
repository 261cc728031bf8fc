"""A message arrives before its arrays do; Flower looks for them again after 1, 2, 4, ... 10 s.

Whoever polls quickly nearly always comes too early once. Here the first pause is 0.02 s.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from fedtune._flower.version import flower_version, is_tested

__all__ = ["hasten_objects", "hasten_server"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5


def hasten_objects(module: ModuleType) -> None:
    """Let `module`, one of Flower's, look again sooner; as often as its time limit allows."""
    vars(module)["pull_objects"] = partial(
        vars(module)["pull_objects"],
        initial_backoff=FIRST_PAUSE_S,
        backoff_cap=LONGEST_PAUSE_S,
        max_tries_per_object=None,
    )


def hasten_server() -> None:
    """The same for the grid of a ServerApp, in its process; does nothing in an untested Flower."""
    if is_tested(flower_version()):
        from flwr.superlink.grid import http_grid

        hasten_objects(http_grid)
