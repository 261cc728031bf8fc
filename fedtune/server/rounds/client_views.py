"""The global parameters as each client gets them: at its own ranks, without what stays with it.

Clients that get the same share one record, so that it is encoded, and travels from process to
process, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import NamedTuple

from flwr.app import ArrayRecord
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.lora.manifests import ranks_in, ranks_of
from fedtune.strategies.lora.ranks import resize
from fedtune.transport.messages import RoundTask
from fedtune.transport.records import to_arrays

__all__ = ["ClientViews", "PendingRound"]

Ranks = tuple[tuple[str, int], ...]


class PendingRound(NamedTuple):
    """A round under way at a client.

    Attributes:
        views: of the global parameters that it was sent.
    """

    task: RoundTask
    views: ClientViews
    node: int


class ClientViews:
    """Views of one set of parameters.

    Args:
        key: of the random start that ranks beyond the global ones get.
        added: what the method has added to the base.
    """

    def __init__(
        self, params: Mapping[str, Tensor], key: str, added: Cumulative | None = None
    ) -> None:
        self._whole, self._key, self._added = params, key, added or Cumulative()
        self._ranks = ranks_in(params)
        self._params = {self._named(self._ranks): dict(params)}
        self._records: dict[tuple[Ranks, frozenset[str]], ArrayRecord] = {}

    def shows(self, params: Mapping[str, Tensor], key: str) -> bool:
        """Whether these are views of that very object."""
        return self._whole is params and self._key == key

    @cached_property
    def base(self) -> ArrayRecord | None:
        """What is added to the base, as a record; None where nothing is."""
        return to_arrays(self._added.sent(self._whole)) if self._added.terms else None

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
    def _named(ranks: Mapping[str, int]) -> Ranks:
        return tuple(sorted(ranks.items()))
