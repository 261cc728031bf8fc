"""The command line: HfArgumentParser with grouped help and one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fedtune import config
from fedtune.errors import ConfigError
from fedtune.nearest import nearest
from fedtune.settings.hf_settings import OWNED, defaults_for

__all__ = [
    "GROUPS",
    "Parser",
    "build_parser",
    "field_names",
    "known_names",
    "parse_flags",
    "reject_owned",
]

GROUPS: tuple[tuple[str, str, type], ...] = (
    ("model", "Base model", config.ModelArguments),
    ("adapter", "Adapter", config.AdapterArguments),
    ("data", "Data", config.DataArguments),
    ("federation", "Federation", config.FederationArguments),
    ("transport", "Transport", config.TransportArguments),
    ("run", "Run", config.RunArguments),
)

BOOL = r"expected true or false, received '\1'. Correct the value"
KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}

_UNSET: Any = object()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling per flag, defaults that say something, and no `%` that argparse would expand."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default not in (None, argparse.SUPPRESS, [], {}):
            text += " (default: %(default)s)"
        return re.sub(r"%%|%(?!\()", "%%", text)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings[:2])
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}"


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are `ConfigError`, not an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print; a wrong choice gets a suggestion."""
        # argparse joins both spellings of a flag: --num_rounds/--num-rounds
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        typed = re.fullmatch(r"(--\w+): invalid (\w+) value: (.*)", message)
        if typed:
            kind = KINDS.get(typed[2], typed[2])
            message = f"{typed[1]}: expected {kind}, received {typed[3]}. Correct the value"
        message = re.sub(r"Truthy value expected: got (.*) but.*", BOOL, message)
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        hint = nearest(choice[1], re.findall(r"[\w.-]+", choice[2])) if choice else ""
        raise ConfigError(f"{message.rstrip('.')}. {hint}".strip())


def build_parser(training_class: type) -> Parser:
    """All flags, grouped by topic; the defaults shown are the ones that apply."""
    groups = [(title, cls) for _, title, cls in GROUPS] + [("HuggingFace Trainer", training_class)]
    # A subclass carries the title, so that the classes themselves stay as they are.
    titled: list[Any] = [
        type(cls.__name__, (cls,), {"_argument_group_name": name}) for name, cls in groups
    ]
    parser = Parser(
        titled,
        allow_abbrev=False,
        formatter_class=_Help,
        usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
        description="Flags win over --config, which without the flag is the YAML of the same name "
        "beside the recipe, if there is one.",
    )
    static = defaults_for(field_names(training_class), {}, has_accelerator=lambda: True)
    for action in parser._actions:
        if action.dest in OWNED:
            action.help = argparse.SUPPRESS
        if action.dest in static:
            action.default = static[action.dest]
        if action.type is string_to_bool and action.nargs is None:  # `bool | None`: allow `--bf16`
            action.nargs, action.const = "?", True
    return parser


def parse_flags(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """Only what is in `argv`: a default never enters a namespace that already has the name."""
    named = (token[2:].split("=")[0] for token in argv if token.startswith("--"))
    reject_owned((name.replace("-", "_").removeprefix("no_") for name in named), "--{}")
    blank = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions})
    namespace, rest = parser.parse_known_args(argv, blank)
    if rest:
        flag = rest[0].split("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"unexpected argument {flag!r}: every setting is `--name value`.")
        raise ConfigError(
            f"unknown flag {flag}. {nearest(flag.lstrip('-'), known_names(parser), prefix='--')}"
        )
    return {name: value for name, value in vars(namespace).items() if value is not _UNSET}


def reject_owned(given: Iterable[str], where: str) -> None:
    """Refuse what the federation decides; `where` has one `{}` for the name."""
    for name in given:
        if name in OWNED:
            raise ConfigError(f"{where.format(name)} is decided by fedtune: {OWNED[name]}.")


def known_names(parser: Parser) -> set[str]:
    """Names that a flag or YAML key may have."""
    return {action.dest for action in parser._actions} - set(OWNED) - {"help"}


def field_names(cls: type) -> set[str]:
    """Fields of a dataclass that its constructor takes."""
    return {field.name for field in dataclasses.fields(cls) if field.init}
