"""Flags and YAML to `Arguments`: fedtune's dataclasses plus `TrainingArguments` or `SFTConfig`.

Precedence: flag, then YAML (`--config`, or the file of the same name beside the recipe), then
fedtune's defaults for HuggingFace settings (`hf_settings.DEFAULTS`), then the dataclass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from fedtune.config import Arguments
from fedtune.errors import ConfigError
from fedtune.lists import split_ints
from fedtune.nearest import nearest
from fedtune.settings.hf_settings import defaults_for, refused_value
from fedtune.settings.parser import (
    GROUPS,
    Parser,
    build_parser,
    field_names,
    known_names,
    parse_flags,
    reject_owned,
)
from fedtune.settings.recipe_yaml import demo_hint, rate_of_method
from fedtune.settings.yaml_config import NotOfType, coerce, load_yaml, type_name

__all__ = ["parse_arguments"]

# Text fields that hold a list, or `k=v` pairs: YAML may write them as a number, list or mapping.
COMMA_SEPARATED = {
    "codec_args",
    "compare",
    "lora_target_modules",
    "min_replies",
    "modules_to_save",
    "seeds",
    "strategy",
    "strategy_args",
    "track",
}

# Either one or the other: a flag for one drops the other one's YAML value.
EXCLUSIVE = (
    ("steps_per_round", "epochs_per_round"),
    ("seed", "seeds"),
    ("dataset_name", "train_file"),
)

# A flag that changes the first drops the second's YAML value, which was meant for the other kind.
BELONGS = {
    "partition": "partition_column",
    "peft_method": "encoder_hidden_size",
    "strategy": "strategy_args",
}

# `--codec none` drops these YAML values: without a codec they mean nothing.
OF_A_CODEC = {"codec_args", "codec_direction", "codec_on", "error_feedback"}


def parse_arguments(
    training_class: type,
    argv: Sequence[str] | None = None,
    *,
    recipe_file: str | Path | None = None,
) -> Arguments:
    """Settings of a run from `argv` (default: the command line); raises `ConfigError`.

    Args:
        training_class: `TrainingArguments` or a subclass such as `SFTConfig`.
        argv: Flags, without the program name.
        recipe_file: The recipe; names the default YAML and the default output directory.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(training_class)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    flags = parse_flags(parser, argv)
    file = _config_file(flags, recipe_file)
    values = _read_yaml(file, parser, _hints(training_class)) if file else {}
    given = {**_without_overruled(values, flags), **flags}
    if "seed" in given and "seeds" in given:
        raise ConfigError("--seed and --seeds are both set: --seed S is --seeds S. Keep --seeds.")
    hints = []
    if file:
        given["config"] = str(file)
        rate = rate_of_method(values, flags)
        if rate is not None:
            given["learning_rate"] = rate
            method, meant = flags["peft_method"], values.get("peft_method", "lora")
            hints.append(f"--learning_rate {rate:g}, that of {method}: the YAML's is for {meant}")
        if "config" not in flags:
            hints += demo_hint(file, given.get("model_name_or_path"))
    args = _build(training_class, given, Path(recipe_file).stem if recipe_file else "fedtune")
    args.hints = tuple(hints)
    return args


def _config_file(flags: Mapping[str, Any], recipe_file: str | Path | None) -> Path | None:
    if "config" in flags:
        return Path(flags["config"])
    beside = Path(recipe_file).with_suffix(".yaml") if recipe_file else None
    return beside if beside and beside.is_file() else None


def _read_yaml(file: Path, parser: Parser, hints: Mapping[str, Any]) -> dict[str, Any]:
    values = load_yaml(file)
    known = known_names(parser) - {"config"}
    reject_owned(values, f"`{{}}` in {file}")
    for key in values:
        if key not in known:
            raise ConfigError(f"{file}: unknown key `{key}`. {nearest(key, known)}")
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    return {
        key: _yaml_value(file, key, value, hints[key], choices.get(key))
        for key, value in values.items()
    }


def _yaml_value(file: Path, key: str, value: Any, hint: Any, choices: Iterable[str] | None) -> Any:
    options = [str(choice) for choice in choices or ()]
    if value is False and "no" in options:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if key in COMMA_SEPARATED:
        value = _join(value)
    if options and value is not None and str(value) not in options:
        raise ConfigError(
            f"{file}: `{key}` expects one of {', '.join(options)}; received {value!r}. "
            f"{nearest(str(value), options)}"
        )
    try:
        return coerce(hint, value)
    except NotOfType:
        raise ConfigError(
            f"{file}: `{key}` expects {type_name(hint)}, received {value!r} "
            f"({type(value).__name__})."
        ) from None


def _without_overruled(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """YAML values without those that a flag makes meaningless."""
    dropped = set()
    for pair in EXCLUSIVE:
        dropped |= {other for name, other in (pair, pair[::-1]) if name in flags}
    for name, detail in BELONGS.items():
        if name in flags and flags[name] != values.get(name):
            dropped.add(detail)
    if flags.get("codec") == "none":
        dropped |= OF_A_CODEC
    return {name: value for name, value in values.items() if name not in dropped}


def _join(value: Any) -> Any:
    """A number, list or mapping as the text a flag would hold.

    [1, 2] -> "1,2";  {a: 1, b: [2, 3]} -> "a=1,b=2,b=3"
    """
    if isinstance(value, dict):
        lists = {key: item if isinstance(item, list) else [item] for key, item in value.items()}
        return ",".join(f"{key}={item}" for key, items in lists.items() for item in items)
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _build(training_class: type, given: Mapping[str, Any], recipe: str) -> Arguments:
    groups = {attribute: cls(**_pick(given, cls)) for attribute, _, cls in GROUPS}
    training = _pick(given, training_class)
    defaults = defaults_for(field_names(training_class), training, has_accelerator=_accelerator)
    training = {"output_dir": _new_output_dir(recipe), **defaults, **training}
    if groups["run"].seeds is not None:
        training["seed"] = split_ints(groups["run"].seeds, "--seeds")[0]
    if problem := refused_value(training):
        raise ConfigError(problem)
    try:
        return Arguments(**groups, training=training_class(**training))
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{training_class.__name__} refuses these settings: {text}") from error


def _new_output_dir(recipe: str) -> str:
    """`outputs/<recipe>-<time>`, not yet there."""
    first = Path("outputs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory, count = first, 1
    while directory.exists():
        count += 1
        directory = first.with_name(f"{first.name}-{count}")
    return str(directory)


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _hints(training_class: type) -> dict[str, Any]:
    classes = [cls for _, _, cls in GROUPS] + [training_class]
    return {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}


def _pick(given: Mapping[str, Any], cls: type) -> dict[str, Any]:
    names = field_names(cls)
    return {name: value for name, value in given.items() if name in names}
