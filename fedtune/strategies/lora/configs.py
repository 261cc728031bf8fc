"""Which of PEFT's LoRA options make a layer compute something else than W x + s B (A x).

Averaging parameters (fedavg, fedit and the like) is right for all of them. A rule that works on the
products, or adds one to the base, is not: what it computes would be of a layer that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.adapters.starts import rewrites_base
from fedtune.strategies.base import Properties

__all__ = ["has_products", "why_not_config"]

# A and B are no factors of one matrix, so that no product of them means anything.
NO_PRODUCT = {
    "target_parameters": "A and B hold one adapter for each expert, so B A is no layer's product",
    "use_bdlora": "A or B is block-diagonal and stored without its zeros",
    "arrow_config": "a router mixes several adapters, token by token",
    "monteclora_config": "A is drawn at random in every step",
    "kasa_config": "a diagonal stands between A and B",
}
# s B A acts, but not as an addition to the frozen weight.
NOT_BESIDE_THE_BASE = {
    "alora_invocation_tokens": "the adapter acts from its invocation tokens on, the base always",
    "use_qalora": "A sees a pooled input, which the frozen weight does not",
    "ensure_weight_tying": "tied layers share one adapter, and an addition would reach one of them",
}
MICA = "mica"  # B stands still


def has_products(config: Mapping[str, Any]) -> bool:
    """Whether a layer with this PEFT config adds s B A."""
    return not any(config.get(option) for option in NO_PRODUCT)


def why_not_config(properties: Properties, config: Mapping[str, Any]) -> str | None:
    """Why a rule is wrong for a PEFT config, beginning with the option; None if it is right."""
    if properties.variants is None:
        return None
    wrong: dict[str, str] = {}
    by_products = properties.changes_base or properties.refactors or properties.mixed_ranks
    if by_products:
        wrong |= NO_PRODUCT
    if properties.changes_base:
        wrong |= NOT_BESIDE_THE_BASE
    for option, reason in wrong.items():
        if config.get(option):
            return f"{option}: {reason}"
    start = rewrites_base(config)
    if by_products and start:
        return (
            f"init_lora_weights {start}: PEFT takes the first adapter, at its rank, out of the "
            "frozen weight wherever it loads the adapter, whose rank the rule may change"
        )
    if config.get("init_lora_weights") == MICA and (by_products or properties.products == "exact"):
        return f"init_lora_weights {MICA}: B stands still and A alone is trained"
    return None
