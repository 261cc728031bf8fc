"""The table of methods in the documentation, made of their declared properties."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.strategies.base import Method

__all__ = ["table"]

HEADER = (
    "method",
    "LoRA products",
    "mixed ranks",
    "sum suffices",
    "client state",
    "changes the base",
    "quantized base",
    "tensors",
)


def table(methods: Mapping[str, type[Method]]) -> str:
    """Markdown, one row per method."""
    rows = [HEADER, ("---",) * len(HEADER), *(_row(*item) for item in methods.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, method: type[Method]) -> tuple[str, ...]:
    has = method.properties
    return (
        f"`{name}`",
        has.products,
        _yes(has.mixed_ranks),
        _yes(has.sum_suffices),
        _yes(has.client_state),
        _yes(has.changes_base),
        "as it is" if has.qlora_safe else "terms beside it",
        "all" if has.variants is None else ", ".join(sorted(has.variants)),
    )


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
