"""The global parameters as each client gets them: at its own ranks, without what stays with it.

Clients that get the same share one record, so that it is encoded, and travels from process to
process, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from flwr.app import ArrayRecord
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.strategies.lora.manifests import ranks_in, ranks_of
from fedtune.strategies.lora.ranks import resize
from fedtune.transport.messages import RoundTask
from fedtune.transport.records import to_arrays

__all__ = ["Flight", "Views"]


class Flight(NamedTuple):
    """A round under way at a client.

    Attributes:
        views: of the global parameters that it was sent.
    """

    task: RoundTask
    views: Views
    node: int


class Views:
    """Views of one set of parameters.

    Args:
        arrays: `params`, encoded.
        key: of the random start that ranks beyond the global ones get.
    """

    def __init__(self, params: Mapping[str, Tensor], arrays: ArrayRecord, key: str) -> None:
        self._key = key
        self._ranks = ranks_in(params)
        self._params = {self._named(self._ranks): dict(params)}
        self._records = {(self._named(self._ranks), frozenset[str]()): arrays}

    def params(self, manifest: Manifest | None) -> dict[str, Tensor]:
        """All parameters at a client's ranks; None: as they are."""
        ranks = ranks_of(manifest) if manifest else self._ranks
        name = self._named(ranks)
        if name not in self._params:
            whole = self._params[self._named(self._ranks)]
            self._params[name] = resize(whole, ranks, key=self._key)
        return self._params[name]

    def record(self, manifest: Manifest | None, without: Collection[str] = ()) -> ArrayRecord:
        """The same as a record; names in `without` are left out."""
        ranks = ranks_of(manifest) if manifest else self._ranks
        name = (self._named(ranks), frozenset(without))
        if name not in self._records:
            params = self.params(manifest)
            self._records[name] = to_arrays({n: t for n, t in params.items() if n not in without})
        return self._records[name]

    @staticmethod
    def _named(ranks: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        return tuple(sorted(ranks.items()))
