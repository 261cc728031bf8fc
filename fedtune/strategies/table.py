"""The tables of `docs/methods.md`, made of what the methods declare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedtune.strategies.base import Correction, Properties, Rule
from fedtune.strategies.compatibility import why_not
from fedtune.strategies.method import Part
from fedtune.strategies.settings import meanings, settings_of

__all__ = ["pairs_table", "settings_table", "table"]

Methods = Mapping[str, type[Part]]

HEADER = (
    "method",
    "axis",
    "LoRA products",
    "mixed ranks",
    "sum suffices",
    "client state",
    "changes the base",
    "new coordinates",
    "robust",
    "quantized base",
    "tensors",
)
# Properties of rules; a method of another axis takes them from the rule it is joined with.
OF_THE_RULE = "-"


def table(methods: Methods) -> str:
    """Markdown, one row per method."""
    return _markdown(HEADER, (_row(*item) for item in methods.items()))


def settings_table(methods: Methods) -> str:
    """Markdown, one row per setting."""
    header = ("method", "setting", "default", "range", "meaning")
    return _markdown(
        header, (row for name, method in methods.items() for row in _settings(name, method))
    )


def pairs_table(methods: Methods) -> str:
    """Markdown, one row per rule and one column per method of another axis."""
    made = {name: method() for name, method in methods.items()}
    rules = {
        name: method
        for name, method in made.items()
        if isinstance(method, Rule) and method.properties.combines
    }
    others = [
        name
        for axis in ("correction", "server_optimizer")
        for name, method in made.items()
        if method.axis == axis
    ]
    rows = (
        (f"`{rule_name}`", *(_yes(why_not(made[name], rule) is None) for name in others))
        for rule_name, rule in rules.items()
    )
    return _markdown(("rule", *(f"`{name}`" for name in others)), rows)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(name: str, method: type[Part]) -> tuple[str, ...]:
    mine = issubclass(method, Rule)
    has = method.properties if issubclass(method, Rule) else Properties()
    keeps = bool(method.extras) if issubclass(method, Correction) else has.personal

    def rule(text: str) -> str:
        return text if mine else OF_THE_RULE

    return (
        f"`{name}`",
        method.axis.replace("_", " ") if has.combines else "-",
        rule(has.products),
        rule(_yes(has.mixed_ranks)),
        _yes(has.sum_suffices),
        _yes(keeps),
        rule(_yes(has.changes_base)),
        rule(_yes(has.refactors)),
        rule(_yes(has.robust)),
        rule("as it is" if has.qlora_safe else "terms beside it"),
        rule("all" if has.variants is None else ", ".join(sorted(has.variants))),
    )


def _settings(name: str, method: type[Part]) -> Iterable[tuple[str, ...]]:
    meaning = meanings(method)
    for setting, item in settings_of(method).items():
        allowed = item.metadata["range"].expected
        yield f"`{name}`", f"`{setting}`", f"{item.default:g}", allowed, meaning[setting]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
