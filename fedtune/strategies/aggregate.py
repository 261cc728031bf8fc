"""`fedtune.aggregate`: one round of any method on a list of updates, without a federation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from fedtune.errors import ConfigError
from fedtune.nearest import nearest
from fedtune.strategies import METHODS, Method, build_method
from fedtune.strategies.agreement import check_agreement, check_variants
from fedtune.strategies.base import Round
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.lora.certificate import relative_errors
from fedtune.strategies.lora.factors import Factors, stack
from fedtune.strategies.lora.names import LoraModule, lora_modules
from fedtune.strategies.lora.rule import Terms
from fedtune.strategies.scaling import Scaling, common_scaling

__all__ = ["Aggregate", "aggregate"]


@dataclass(frozen=True)
class Aggregate:
    """What a round makes of the clients' updates.

    Attributes:
        params: the new adapter, under the names and in the dtypes of the updates.
        base: module -> (B, A); B @ A, (out, in), is added to the frozen weight. Scaling is in it.
        scaling: module -> factor of the new adapter's B @ A.
        residual: relative error of the merged update, base included, against sum p_k s_k B_k A_k:
            rounding (1e-7 in fp32) for exact rules, nan where a factor was not given. With DoRA it
            is that of the products alone.
        residual_fedavg: the same for averaging A and B; lower ranks are padded with zeros.
    """

    params: dict[str, Tensor]
    base: dict[str, Factors]
    scaling: dict[str, float]
    residual: float
    residual_fedavg: float


def aggregate(
    name: str,
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    scaling: Scaling = 1.0,
    **settings: float,
) -> Aggregate:
    """Aggregate the clients' parameters by the method called `name`.

    Args:
        name: a method of `--strategy`, such as fedavg, fedex_lora or flexlora.
        updates: one `{canonical name: tensor}` per client; ranks may differ where the rule allows.
        weights: one positive number per client; None for equal ones.
        reference: the previous global parameters, and static ones; server optimizers need it.
        scaling: s of s B A: a number, a dict by module (the name without `.lora_A.weight`), or a
            list with one of them per client.
        settings: of the method, as in `--strategy_args`.

    Raises:
        ConfigError: an unknown name or setting, or tensors that the method is not right for.
        ManifestError: updates that do not agree with each other.
    """
    method = _method(name, settings)
    by = _weights(weights, len(updates))
    check_variants(name, method.properties, [*updates[0]])
    check_agreement(name, method.properties, updates)
    equal, scales = common_scaling(updates, by, scaling)
    fold = method.fold(Round(reference=reference or {}, scaling=scales))
    for update, weight in zip(equal, by, strict=True):
        fold.add(update, weight)
    params = _step(name, method, fold.result(), reference)
    params = {key: value.to(updates[0][key].dtype) for key, value in sorted(params.items())}
    base: dict[str, Factors] = getattr(fold, "base", {})
    static = {key: t for key, t in (reference or {}).items() if key not in updates[0]}
    whole = [{**static, **update} for update in equal]
    residual, residual_fedavg = _residuals(whole, by, scales, {**static, **params}, base)
    return Aggregate(params, base, scales, residual, residual_fedavg)


def _method(name: str, settings: Mapping[str, float]) -> Method:
    if name in LORA_RULES:
        return _lora_rule(name, settings)
    if name.split("+")[0] not in METHODS:
        raise ConfigError(
            f"aggregate: unknown method {name!r}. {nearest(name, {**METHODS, **LORA_RULES})}"
        )
    return build_method(name, weight_by="uniform", settings=settings)


def _lora_rule(name: str, settings: Mapping[str, float]) -> Method:
    known = {item.name: item for item in fields(LORA_RULES[name]) if item.name != "weight_by"}
    for setting, value in settings.items():
        if setting not in known:
            hint = nearest(setting, known) if known else "It has none: leave it out."
            raise ConfigError(f"aggregate: {setting!r} is no setting of {name}. {hint}")
        allowed = known[setting].metadata["range"]
        if not allowed.holds(value):
            raise ConfigError(f"{name}: {setting}: expected {allowed.expected}, received {value}.")
    return LORA_RULES[name](**settings)  # type: ignore[arg-type]


def _weights(weights: Sequence[float] | None, clients: int) -> list[float]:
    if not clients:
        raise ConfigError("aggregate: expected at least one update, received none.")
    by = [1.0] * clients if weights is None else [float(weight) for weight in weights]
    if len(by) != clients or not all(0 < weight < math.inf for weight in by):
        raise ConfigError(f"weights: expected {clients} numbers > 0, received {by}.")
    return by


def _step(
    name: str,
    method: Method,
    params: dict[str, Tensor],
    reference: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The server's step on every tensor, where the method has one of its own."""
    if type(method).step is Method.step:
        return params
    missing = sorted(params.keys() - (reference or {}).keys())
    if reference is None or missing:
        raise ConfigError(
            f"{name}: expected `reference` with the previous global value of `{missing[0]}`, "
            "received none."
        )
    return {key: method.step(reference[key], value, {})[0] for key, value in params.items()}


def _residuals(
    updates: Sequence[Mapping[str, Tensor]],
    weights: list[float],
    scaling: Mapping[str, float],
    params: Mapping[str, Tensor],
    base: Mapping[str, Factors],
) -> tuple[float, float]:
    """Of the method and of FedAvg; 0 without LoRA, whose mean is the definition."""
    modules = [lora_modules(updates[0])[name] for name in scaling]
    if not modules:
        return 0.0, 0.0
    if any(name not in updates[0] for module in modules for name in (module.b, module.a)):
        return math.nan, math.nan

    def layers() -> Iterator[tuple[Factors, tuple[Factors, Factors]]]:
        for module in modules:
            factors = tuple(_factors(update, module) for update in updates)
            terms = Terms(module, factors, tuple(weights), scaling[module.name])
            plain = stack([(terms.scaling, terms.mean())])
            yield terms.update(), (_merged(terms, params, base.get(module.name)), plain)

    residual, residual_fedavg = relative_errors(layers())
    return residual, residual_fedavg


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
