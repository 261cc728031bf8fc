"""One attempt of a round while its replies come in: all that is summed up over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.strategies.base import ClientStats, Method, Round
from fedtune.strategies.lora.configs import has_products
from fedtune.strategies.lora.manifests import ranks_of
from fedtune.strategies.lora.names import is_lora_a, is_lora_b
from fedtune.strategies.mean import RunningMean
from fedtune.strategies.norms import squared_distance
from fedtune.strategies.residuals import Certificate
from fedtune.strategies.updates import Update

__all__ = ["Gathering", "certifies"]

# For the residuals the factors of all updates are kept, up to this many: 32 MB in fp32, and 1 GB
# for a LoRA rule. They are a figure beside a mean that needs no more memory for more clients.
CERTIFIED_VALUES, CERTIFIED_VALUES_OF_A_RULE = 8_000_000, 250_000_000


class Gathering:
    """Sums over the good replies of a round.

    Args:
        now: the round.
        static: frozen tensors that every client has.
        certified: whether the factors are kept for the residuals.
        same_ranks: whether all clients, and the global parameters, have the same.
    """

    def __init__(
        self,
        method: Method,
        now: Round,
        static: Mapping[str, Tensor],
        *,
        certified: bool,
        same_ranks: bool,
    ) -> None:
        self._method, self._now, self._static = method, now, static
        self.fold = method.fold(now)
        self.control = RunningMean()
        self.certificate = Certificate(now.scaling) if certified else None
        # A distance has a meaning where a parameter means the same before and after the round.
        self.spread = Spread() if same_ranks and not method.properties.refactors else None
        self.stats: list[ClientStats] = []

    @classmethod
    def of(
        cls,
        method: Method,
        now: Round,
        manifest: Manifest,
        clients: Sequence[Manifest],
        static: Mapping[str, Tensor],
        *,
        updates: int,
    ) -> Gathering:
        """For a round of clients with these manifests.

        Args:
            manifest: of the global parameters.
            updates: that may come.
        """
        held = [ranks_of(one) for one in (*clients, manifest)]
        most = {name: max(ranks[name] for ranks in held) for name in held[-1]}
        return cls(
            method,
            replace(now, rank=most),
            static,
            certified=certifies(method, manifest, updates),
            same_ranks=all(ranks == held[-1] for ranks in held),
        )

    def add(self, update: Update, start: Mapping[str, Tensor], age: int = 0) -> None:
        """Fold one client's update in.

        Args:
            start: what it was sent.
            age: rounds that have ended since then.

        Raises:
            ManifestError: the method cannot use it.
        """
        weight = self._method.weigh(update.stats)
        params = self._method.rebase(update.params, start, self._now.reference, age)
        self.fold.add(params, weight)
        self.stats.append(update.stats)
        if update.control_change:
            self.control.add(update.control_change, self._method.share(update.stats))
        if self.certificate is not None:
            self.certificate.add({**self._static, **start, **params}, weight)
        if self.spread is not None:
            moved = squared_distance(params, self._now.reference) if age else update.squared_norm
            self.spread.add(moved, weight)


def certifies(method: Method, manifest: Manifest, clients: int) -> bool:
    """Whether the residuals of a round are worth keeping its factors, and can be known."""
    entries = manifest.entries
    if not all(map(method.travels, entries)):  # the server never sees what stays with clients
        return False
    if not has_products(manifest.adapter_config):
        return False
    lora = [name for name in entries if is_lora_a(name) or is_lora_b(name)]
    values = clients * sum(math.prod(entries[name].shape) for name in lora)
    if not method.properties.sum_suffices and method.properties.variants is not None:
        return bool(lora)  # the rule keeps them anyway
    for_lora = method.properties.variants is not None
    return 0 < values <= (CERTIFIED_VALUES_OF_A_RULE if for_lora else CERTIFIED_VALUES)


class Spread:
    """Weighted spread of client updates: sum p|d_k|^2 - |sum p d_k|^2, in any order of arrival."""

    def __init__(self) -> None:
        self._squares: list[float] = []
        self._weights: list[float] = []

    def add(self, squared_norm: float, weight: float) -> None:
        """One client's update."""
        self._squares.append(weight * squared_norm)
        self._weights.append(weight)

    def around(self, squared_norm_of_mean: float) -> float:
        """Root of the spread around the mean update."""
        mean = math.fsum(self._squares) / math.fsum(self._weights)
        return math.sqrt(max(0.0, mean - squared_norm_of_mean))
