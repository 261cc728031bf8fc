"""Rules about the federated method, which is built once for all of them."""

from __future__ import annotations

from collections.abc import Callable

from fedtune.checks.model import LORA
from fedtune.config import Arguments, sampled_clients
from fedtune.strategies import Method, for_mixed_ranks, strategy_of

__all__ = ["lora_rule", "of_method", "strategy"]


def of_method(
    *rules: Callable[[Arguments, Method], str | None],
) -> Callable[[Arguments], str | None]:
    """One rule of several over the method; it raises ConfigError where there is no such method."""

    def of(args: Arguments) -> str | None:
        method = strategy_of(args.federation)
        return next((problem for rule in rules if (problem := rule(args, method))), None)

    return of


def strategy(args: Arguments, method: Method) -> str | None:
    """What the method asks of the federation and of the Trainer."""
    fed = args.federation
    if method.extras and getattr(args.training, "fp16", False):
        return (
            f"--strategy {fed.strategy} with --fp16: the loss scaler leaves out steps that control "
            "variates count on. Use --bf16."
        )
    sampled, least = (
        sampled_clients(fed.fraction_train, fed.num_clients),
        method.rule.least_updates(),
    )
    if sampled < least:
        return (
            f"--strategy {fed.strategy}: expected at least {least} clients asked in a round, "
            f"received {sampled}. Raise --num_clients or --fraction_train, or change what asks for "
            "so many in --strategy_args (f, m, beta)."
        )
    if method.rule.buffer(sampled) and fed.min_replies is not None:
        return (
            f"--min_replies with --strategy {fed.strategy}: the buffer says how many updates end a "
            "round. Leave it out, and set size in --strategy_args."
        )
    return None


def lora_rule(args: Arguments, method: Method) -> str | None:
    """Whether the rule is right for this adapter, and for these ranks."""
    adapter, fed, properties = args.adapter, args.federation, method.properties
    kind = adapter.peft_method if adapter.peft_method in LORA else "other"
    if properties.variants is not None and kind not in properties.variants:
        kinds = " or ".join(sorted(properties.variants & set(LORA)))
        return (
            f"--strategy {fed.strategy}: expected --peft_method {kinds}, received "
            f"{adapter.peft_method}. Use that, or fedavg."
        )
    if adapter.client_ranks is None:
        return None
    ranks = adapter.ranks or []
    if kind == "other":
        return f"--client_ranks needs --peft_method lora, received {adapter.peft_method}."
    if len(ranks) != fed.num_clients or min(ranks) < 1:
        return (
            f"--client_ranks: expected {fed.num_clients} whole numbers >= 1, one per client, "
            f"received {adapter.client_ranks}."
        )
    if len(set(ranks)) > 1 and not properties.mixed_ranks:
        return (
            f"--client_ranks with --strategy {fed.strategy}: it needs equal ranks. Use "
            f"{for_mixed_ranks()}."
        )
    return None
