"""`fedtune.aggregate`: one round of any method on a list of updates, without a federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedtune.adapters import Entry
from fedtune.errors import ConfigError, ManifestError
from fedtune.strategies import Method, build_method
from fedtune.strategies.aggregator import Aggregator, Contribution
from fedtune.strategies.agreement import check_agreement, check_reference, check_variants
from fedtune.strategies.base import Round
from fedtune.strategies.given import given_reference, given_updates, given_weights
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.manifests import ranks_in
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
        ConfigError: an argument of another type or out of range, an unknown name or setting, or
            tensors that the method is not right for.
        ManifestError: updates, or a reference, that do not agree with update 0, or that are not
            finite.
    """
    method = _method(name, settings)
    given, start = given_updates(updates), given_reference(reference)
    by = given_weights(weights, len(given))
    check_variants(name, method.properties, [*given[0]])
    check_agreement(name, method.properties, given)
    check_reference(name, method.properties, given[0], start)
    equal, scales = common_scaling(given, by, scaling)
    now = Round(reference=start, scaling=scales, rank=_ranks([start, *given]))
    aggregation = Aggregator(method).begin(now)
    for update, weight in zip(equal, by, strict=True):
        aggregation.add(Contribution(update, weight=weight))
    if method.optimizer is not None:
        _check_step(name, aggregation.result, start)
    found = aggregation.finish()
    params = {key: value.to(given[0][key].dtype) for key, value in sorted(found.params.items())}
    base = dict(found.terms)
    static = {key: tensor for key, tensor in start.items() if key not in given[0]}
    whole = [{**static, **update} for update in equal]
    residual, residual_fedavg = residuals(whole, by, scales, {**static, **params}, base)
    return Aggregate(params, base, scales, residual, residual_fedavg)


def _method(name: str, settings: Mapping[str, float]) -> Method:
    """The method called `name`, if the updates are all it needs."""
    if not isinstance(name, str):
        raise ConfigError(
            f"aggregate: expected the name of a method, received {name!r}. Give one of --strategy."
        )
    if name.startswith(STOCK):
        raise ConfigError(
            f"aggregate: {name} reads Flower's messages, which only a run has. Use --strategy."
        )
    try:
        method = build_method(name, weight_by="uniform", settings=settings)
    except ConfigError as error:
        text = str(error).replace("--strategy_args", "aggregate").replace("--strategy", "aggregate")
        raise ConfigError(text) from None
    if method.correction is not None:
        raise ConfigError(
            f"aggregate: {method.correction.name} changes how clients train, not what the server "
            "makes of their updates. Leave it out; alone it is fedavg."
        )
    if method.properties.needs_steps:
        raise ConfigError(
            f"aggregate: {name} needs every client's number of steps, which updates do not hold. "
            "Use fedavg."
        )
    return method


def _ranks(parameters: Sequence[Mapping[str, Tensor]]) -> dict[str, int]:
    """Module -> the largest rank there is; empty without a reference, whose rank is the global."""
    if not parameters[0]:
        return {}
    held = [ranks_in(params) for params in parameters]
    return {name: max(ranks.get(name, 0) for ranks in held) for name in held[1]}


def _check_step(name: str, params: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """Whether the server can go from `reference` to what the rule has made."""
    missing = sorted(params.keys() - reference.keys())
    if missing:
        raise ConfigError(
            f"{name}: expected `reference` with the previous global value of `{missing[0]}`, "
            "received none."
        )
    for key, value in sorted(params.items()):
        if value.shape != reference[key].shape:  # the rule has changed the rank
            raise ManifestError(
                f"reference: `{key}`: {name} expected {Entry.of(value)}, as the round has made it, "
                f"received {Entry.of(reference[key])}. Give the global adapter at that rank."
            )
