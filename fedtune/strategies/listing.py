"""What `fedtune methods` prints: every name of `--strategy` and `--workflow` that is found."""

from __future__ import annotations

import inspect

from fedtune.aligned import aligned
from fedtune.extensions import WORKFLOWS
from fedtune.strategies.base import Rule
from fedtune.strategies.registry import METHODS, setting_names

__all__ = ["listing"]

HEAD = ("--strategy", "axis", "mixed ranks", "settings", "from", "")
WORKFLOW_HEAD = ("--workflow", "from", "")


def listing() -> str:
    """Two tables; the last column is the first sentence of each class's docstring."""
    methods = [HEAD, *(_method(name) for name in METHODS)]
    workflows = [WORKFLOW_HEAD, *(_workflow(name) for name in WORKFLOWS)]
    return "\n".join([*aligned(methods, ()), "", *aligned(workflows, ())])


def _method(name: str) -> tuple[str, ...]:
    cls = METHODS[name]
    mixed = "yes" if issubclass(cls, Rule) and cls.properties.mixed_ranks else "-"
    settings = ", ".join(setting_names(name)) or "-"
    axis = cls.axis.replace("_", " ")
    return name, axis, mixed, settings, METHODS.source(name), _first(cls)


def _workflow(name: str) -> tuple[str, ...]:
    return name, WORKFLOWS.source(name), _first(WORKFLOWS[name])


def _first(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]
