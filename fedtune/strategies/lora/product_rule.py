"""A rule over products: one pure function from the clients' factors of a layer to the new ones.

    combine(terms) -> the new adapter's factors, and what is added to the frozen base

`ProductFold` keeps the factors of all updates (server memory: clients x adapter), since products
are not linear in them, and calls `combine` layer by layer. All other tensors go through the
running mean. Updates are sorted before they are combined: arrival order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ManifestError
from fedtune.strategies.base import ANY_ROUND, Round, Rule
from fedtune.strategies.lora.cumulative import Cumulative, accumulate
from fedtune.strategies.lora.factors import Factors, stack
from fedtune.strategies.lora.names import LoraModule, lora_modules
from fedtune.strategies.lora.ranks import extend, pad
from fedtune.strategies.mean import RunningMean, unrounded
from fedtune.strategies.settings import COUNT, SHARE, setting

__all__ = [
    "BaseRule",
    "NewLayer",
    "ProductFold",
    "ProductRule",
    "Terms",
    "fingerprint",
    "padded_mean",
]


@dataclass(frozen=True)
class Terms:
    """One layer in one round.

    Attributes:
        module: the layer and its tensors' names.
        factors: (B_k, A_k) of each client.
        weights: of each client, positive, not normalised.
        scaling: s, the same for all clients.
        server_round: from 1.
        reference: the factors that the clients started from; None if unknown.
        global_rank: of the global adapter; 0 if unknown.
    """

    module: LoraModule
    factors: tuple[Factors, ...]
    weights: tuple[float, ...]
    scaling: float
    server_round: int = 1
    reference: Factors | None = None
    global_rank: int = 0

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """p_k, which sum to 1."""
        total = math.fsum(self.weights)
        return tuple(weight / total for weight in self.weights)

    @property
    def rank(self) -> int:
        """Of the new adapter: it does not shrink because its largest client was not sampled."""
        return max(self.global_rank, *(factors.rank for factors in self.factors))

    def update(self) -> Factors:
        """What the clients ask for: sum p_k s B_k A_k, in fp64."""
        pairs = zip(self.shares, self.factors, strict=True)
        return stack((p * self.scaling, factors) for p, factors in pairs)

    def mean(self) -> Factors:
        """(sum p_k B_k, sum p_k A_k) as `RunningMean` has it; lower ranks are padded with 0."""
        return padded_mean(zip(self.factors, self.weights, strict=True))

    def widen(self, factors: Factors) -> Factors:
        """These factors at `rank`: what nobody sent stays as it was, or starts afresh."""
        key = str(self.server_round)
        return pad(self.module, extend(factors, self.reference, self.rank), self.rank, key)


def padded_mean(pairs: Iterable[tuple[Factors, float]]) -> Factors:
    """(sum w_k B_k, sum w_k A_k) / sum w_k at the largest rank, lower ones padded with 0."""
    kept, mean = list(pairs), RunningMean()
    rank = max(factors.rank for factors, _ in kept)
    for (b, a), weight in kept:
        missing = rank - b.shape[1]
        padded_b = torch.nn.functional.pad(b, (0, missing))
        mean.add({"B": padded_b, "A": torch.nn.functional.pad(a, (0, 0, 0, missing))}, weight)
    return Factors(**mean.result())


class NewLayer(NamedTuple):
    """The new adapter, and the exact addition to the frozen base (scaled), if there is one."""

    adapter: Factors
    base: Factors | None = None


@dataclass(frozen=True)
class ProductRule(Rule):
    """A method that needs the factors of every client."""

    def combine(self, terms: Terms) -> NewLayer:
        """New factors of one layer."""
        raise NotImplementedError

    def fold(self, now: Round = ANY_ROUND) -> ProductFold:
        """A fresh fold for one round."""
        return ProductFold(self, now)


@dataclass(frozen=True)
class BaseRule(ProductRule):
    """A rule that adds to the base; what it added rests in a frozen adapter beside it.

    Attributes:
        max_rank: largest rank of that adapter, 0 for no bound.
        tolerance: error that its recompression may make in a round, relative to the round's term.
    """

    max_rank: int = setting(0, COUNT)
    tolerance: float = setting(1e-7, SHARE)

    def cumulate(self, total: Cumulative, terms: Mapping[str, Factors]) -> Cumulative:
        """The total with a round's terms, recompressed."""
        return accumulate(total, terms, tolerance=self.tolerance, max_rank=int(self.max_rank))


class ProductFold:
    """Fold of a `ProductRule`; `base` (module -> term) is known once `result` was called."""

    def __init__(self, rule: ProductRule, now: Round) -> None:
        self._rule = rule
        self._now = now
        self._updates: list[tuple[Mapping[str, Tensor], float]] = []
        self._others = RunningMean()
        self.base: dict[str, Factors] = {}

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Keep one client's factors; fold its other tensors in.

        Raises:
            ManifestError: one of a layer's two factors is missing.
        """
        names = {name for module in lora_modules(params).values() for name in (module.b, module.a)}
        for name in sorted(names - params.keys()):
            raise ManifestError(
                f"`{name}` is missing: expected both factors of a LoRA layer, received one. Send "
                "all that `collect` returns."
            )
        self._updates.append(({name: params[name] for name in names}, weight))
        self._others.add({n: tensor for n, tensor in params.items() if n not in names}, weight)

    def result(self) -> dict[str, Tensor]:
        """The new adapter, in the `unrounded` dtypes of the inputs."""
        if not self._updates:
            raise ValueError("no update was folded")
        updates = sorted(self._updates, key=fingerprint)
        params = self._others.result()
        for module in lora_modules(updates[0][0]).values():
            terms = layer_terms(module, updates, self._now)
            layer = self._rule.combine(terms)
            b, a = terms.factors[0]
            adapter = layer.adapter
            params[module.b] = adapter.B.to(unrounded(b.dtype))
            params[module.a] = adapter.A.to(unrounded(a.dtype))
            if layer.base is not None:
                # Half precision would cost a sum over clients what the rule gained.
                self.base[module.name] = layer.base.to(torch.promote_types(b.dtype, torch.float32))
        return params


def layer_terms(
    module: LoraModule, updates: list[tuple[Mapping[str, Tensor], float]], now: Round
) -> Terms:
    """The clients' factors of one layer.

    Raises:
        ManifestError: the layer's factors are not matrices (Conv2d).
    """
    factors = tuple(Factors(update[module.b], update[module.a]) for update, _ in updates)
    if factors[0].A.ndim != 2:
        raise ManifestError(
            f"`{module.a}`: expected a matrix (Linear, Conv1D, Embedding), received "
            f"{factors[0].A.ndim} dimensions. Use fedit for convolutions."
        )
    weights = tuple(weight for _, weight in updates)
    known = module.b in now.reference and module.a in now.reference
    return Terms(
        module,
        factors,
        weights,
        now.scaling[module.name],
        now.number,
        Factors(now.reference[module.b], now.reference[module.a]) if known else None,
        now.rank.get(module.name, 0),
    )


def fingerprint(update: tuple[Mapping[str, Tensor], float]) -> tuple[float, ...]:
    """Sorts updates by what is in them."""
    params, weight = update
    return weight, *(float(params[name].sum(dtype=torch.float64)) for name in sorted(params))
