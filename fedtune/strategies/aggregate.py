"""`fedtune.aggregate`: one round of any method on a list of updates, without a federation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedtune.errors import ConfigError
from fedtune.strategies import Method, build_method
from fedtune.strategies.agreement import check_agreement, check_variants
from fedtune.strategies.base import Round
from fedtune.strategies.combined import Combined
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.registry import STOCK
from fedtune.strategies.residuals import residuals
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
        name: a rule or server optimizer of `--strategy`, such as fedavg, fedex_lora or fedadam,
            or two joined by `+`. What needs more than the updates is refused: corrections act
            while clients train, fednova counts their steps.
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
    residual, residual_fedavg = residuals(whole, by, scales, {**static, **params}, base)
    return Aggregate(params, base, scales, residual, residual_fedavg)


def _method(name: str, settings: Mapping[str, float]) -> Method:
    """The method called `name`, if the updates are all it needs."""
    if name.startswith(STOCK):
        raise ConfigError(
            f"aggregate: {name} reads Flower's messages, which only a run has. Use --strategy."
        )
    try:
        method = build_method(name, weight_by="uniform", settings=settings)
    except ConfigError as error:
        text = str(error).replace("--strategy_args", "aggregate").replace("--strategy", "aggregate")
        raise ConfigError(text) from None
    correction = method.correction()
    if correction is not None:
        raise ConfigError(
            f"aggregate: {correction.name} changes how clients train, not what the server makes of "
            "their updates. Leave it out; alone it is fedavg."
        )
    rule = method.rule if isinstance(method, Combined) else method
    if type(rule).server_rate is not Method.server_rate:
        raise ConfigError(
            f"aggregate: {name} needs every client's number of steps, which updates do not hold. "
            "Use fedavg."
        )
    return method


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
    server = method.server if isinstance(method, Combined) else method
    if type(server).step is Method.step:
        return params
    missing = sorted(params.keys() - (reference or {}).keys())
    if reference is None or missing:
        raise ConfigError(
            f"{name}: expected `reference` with the previous global value of `{missing[0]}`, "
            "received none."
        )
    return {key: method.step(reference[key], value, {})[0] for key, value in params.items()}
