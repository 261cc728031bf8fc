"""How far a round's aggregate is from what its updates ask for: of the method, and of FedAvg.

The factors of all updates are needed at once, so this costs clients x adapter while a round lasts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.strategies.lora.certificate import relative_errors
from fedtune.strategies.lora.configs import has_products
from fedtune.strategies.lora.factors import Factors, stack
from fedtune.strategies.lora.names import LoraModule, is_lora_a, is_lora_b, lora_modules
from fedtune.strategies.lora.product_rule import Terms, fingerprint
from fedtune.strategies.method import Method

__all__ = ["Certificate", "certifies", "residuals"]

# For the residuals the factors of all updates are kept, up to this many: 32 MB in fp32, and 1 GB
# for a LoRA rule. They are a figure beside a mean that needs no more memory for more clients.
CERTIFIED_VALUES, CERTIFIED_VALUES_OF_A_RULE = 8_000_000, 250_000_000


class Certificate:
    """Collects the factors of one round.

    Args:
        scaling: module -> s, the same for all clients.
    """

    def __init__(self, scaling: Mapping[str, float]) -> None:
        self._scaling = scaling
        self._updates: list[tuple[Mapping[str, Tensor], float]] = []

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Keep one client's factors, frozen ones included."""
        modules = lora_modules(params).values()
        names = [name for module in modules for name in (module.b, module.a) if name in params]
        self._updates.append(({name: params[name] for name in names}, weight))

    def residuals(
        self, params: Mapping[str, Tensor], base: Mapping[str, Factors]
    ) -> tuple[float | None, float | None]:
        """Of the method and of FedAvg; None where the server does not have both factors.

        To the last bit whatever the order of arrival.
        """
        if not self._updates or not lora_modules(self._updates[0][0]):
            return None, None
        updates, weights = zip(*sorted(self._updates, key=fingerprint), strict=True)
        errors = residuals(updates, weights, self._scaling, params, base)
        of_method, of_fedavg = (error if math.isfinite(error) else None for error in errors)
        return of_method, of_fedavg


def certifies(method: Method, manifest: Manifest, clients: int) -> bool:
    """Whether the residuals of a round are worth keeping its factors, and can be known."""
    entries = manifest.entries
    if not all(map(method.rule.travels, entries)):  # the server never sees what stays with clients
        return False
    if not has_products(manifest.adapter_config):
        return False
    lora = [name for name in entries if is_lora_a(name) or is_lora_b(name)]
    values = clients * sum(math.prod(entries[name].shape) for name in lora)
    if not method.properties.sum_suffices and method.properties.variants is not None:
        return bool(lora)  # the rule keeps them anyway
    for_lora = method.properties.variants is not None
    return 0 < values <= (CERTIFIED_VALUES_OF_A_RULE if for_lora else CERTIFIED_VALUES)


def residuals(
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    scaling: Mapping[str, float],
    params: Mapping[str, Tensor],
    base: Mapping[str, Factors],
) -> tuple[float, float]:
    """Relative errors of the method and of FedAvg; 0 without LoRA, whose mean is the definition.

    Args:
        params: the new adapter, frozen factors included.
        base: module -> what the round has added to the base.

    nan where a factor is missing.
    """
    modules = [module for name, module in lora_modules(updates[0]).items() if name in scaling]
    if not modules:
        return 0.0, 0.0
    if any(name not in update for update in updates for m in modules for name in (m.b, m.a)):
        return math.nan, math.nan

    def layers() -> Iterator[tuple[Factors, tuple[Factors, Factors]]]:
        for module in modules:
            factors = tuple(_factors(update, module) for update in updates)
            terms = Terms(module, factors, tuple(weights), scaling[module.name])
            plain = stack([(terms.scaling, terms.mean())])
            yield terms.update(), (_merged(terms, params, base.get(module.name)), plain)

    of_method, of_fedavg = relative_errors(layers())
    return of_method, of_fedavg


def _merged(terms: Terms, params: Mapping[str, Tensor], base: Factors | None) -> Factors:
    """What the round adds to a layer's weight; the clients' mean where B stayed with them."""
    module, s = terms.module, terms.scaling
    if module.b not in params:
        a = params[module.a].flatten(1)
        pairs = zip(terms.shares, terms.factors, strict=True)
        return stack((p * s, Factors(own.B, a)) for p, own in pairs)
    adapter = (s, _factors(params, module))
    return stack([adapter] if base is None else [adapter, (1.0, base)])


def _factors(params: Mapping[str, Tensor], module: LoraModule) -> Factors:
    return Factors(params[module.b].flatten(1), params[module.a].flatten(1))
