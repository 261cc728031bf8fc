"""Tables of names that other packages may add to, by entry point.

    [project.entry-points."fedtune.methods"]
    median_of_means = "their_package:MedianOfMeans"

They are looked up when a name that is not built in is asked for, or all names are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fedtune.errors import ConfigError

__all__ = ["WORKFLOWS", "Extensions"]

T = TypeVar("T")


class Extensions(Mapping[str, T]):
    """Name -> what it stands for; built-in names first, then those of other packages, sorted.

    Args:
        group: of the entry points.
        flag: by which a name is given.
        built_in: the names of this package; text is where to load it from, as in an entry point.
    """

    def __init__(self, group: str, flag: str, built_in: Mapping[str, T | str]) -> None:
        self._group, self._flag = group, flag
        self.built_in = dict(built_in)
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> T:
        known: Any = self.built_in.get(name)
        if known is not None and not isinstance(known, str):
            return known  # type: ignore[no-any-return]
        if name not in self._loaded:
            entry = EntryPoint(name, known, self._group) if known else self._found[name]
            self._loaded[name] = self._load(entry)
        found: T = self._loaded[name]
        return found

    def __contains__(self, name: object) -> bool:
        """Whether there is such a name; one of another package has to be there to be loaded."""
        return name in self.built_in or super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        yield from sorted(self._found)

    def __len__(self) -> int:
        return len(self.built_in) + len(self._found)

    def source(self, name: str) -> str:
        """Name and version of the package that a name is from."""
        if name in self.built_in:
            return "fedtune"
        package = self._found[name].dist
        return f"{package.name} {package.version}" if package else "unknown"

    @cached_property
    def _found(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self._group):
            if entry.name in self.built_in or entry.name in found:
                raise ConfigError(
                    f"{self._flag}: two packages bring {entry.name!r} ({self._group}): "
                    f"{_package(found.get(entry.name))} and {_package(entry)}. Remove one of them."
                )
            found[entry.name] = entry
        return found

    def _load(self, entry: EntryPoint) -> Any:
        try:
            return entry.load()
        except Exception as error:  # whatever that package does when it is imported
            raise ConfigError(
                f"{self._flag} {entry.name}: {_package(entry)} cannot be loaded from "
                f"{entry.value}: {type(error).__name__}: {error}. Mend or remove that package."
            ) from error


def _package(entry: EntryPoint | None) -> str:
    if entry is None:
        return "fedtune"
    return entry.dist.name if entry.dist else entry.value


WORKFLOWS: Extensions[Any] = Extensions(
    "fedtune.workflows", "--workflow", {"central": "fedtune.server.rounds.central:CentralRounds"}
)
