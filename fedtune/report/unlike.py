"""What differs between runs that are compared: which losses mean the same, and which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedtune.decisive import decides
from fedtune.report import figures
from fedtune.report.curves import run_names
from fedtune.results.summary import Summary
from fedtune.results.values import number

__all__ = ["Note", "differing", "notes"]

GROUPS = ("model", "adapter", "data", "federation", "transport")
TOLD = {"strategy", "num_rounds"}  # by columns of their own
# And by what a file holds, where that is recorded, instead of where it lies.
ELSEWHERE = {*TOLD, "train_file", "eval_file", "dataset_name"}
NAMED_ABOVE = {"model_name_or_path"}
# What decides which tokens of a held-out row are scored.
SCORED = (
    "max_length",
    "completion_only_loss",
    "assistant_only_loss",
    "loss_type",
    "text_column",
    "label_column",
)
# Goes with the codec.
OF_CODEC = {"codec_on", "codec_direction", "codec_args", "error_feedback"}
SHORT = 8  # characters of a hash
MOST_NAMES = 3


class Note(NamedTuple):
    """One remark; `serious` where losses must not be compared."""

    words: str
    serious: bool = False


def differing(summaries: Sequence[Summary]) -> dict[str, list[str]]:
    """Setting -> its value in every run, for settings that are not the same in all."""
    settings = [_settings(summary) for summary in summaries]
    names = list(dict.fromkeys(name for one in settings for name in one))
    columns = {name: [one.get(name, "") for one in settings] for name in names}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def notes(summaries: Sequence[Summary]) -> list[Note]:
    """What a reader must know before comparing the losses; the gravest first."""
    if len(summaries) < 2:
        return []
    names, differ = run_names(summaries), differing(summaries)
    scored = [name for name in SCORED if name in differ]
    found = [
        _unlike(names, "held-out rows differ", [_rows(one, "held_out") for one in summaries]),
        _unlike(names, "tokenizers differ", [_of_model(one, "tokenizer") for one in summaries]),
        *(
            _unlike(names, f"{name} differs", [(value, value) for value in differ[name]])
            for name in scored
        ),
    ]
    serious = [Note(f"{words}; losses are not comparable", True) for words in found if words]
    found = [
        _unlike(names, "base models differ", [_base(one) for one in summaries]),
        _unlike(names, "training rows differ", [_rows(one, "train") for one in summaries]),
        _unlike(names, "rounds differ", [_text(one.rounds) for one in summaries]),
        _unlike(names, "seeds differ", [_text(",".join(one.seed_names)) for one in summaries]),
        _unlike(names, "not all completed", [_ended(one) for one in summaries]),
        _others(summaries, {name: differ[name] for name in differ if name not in scored}),
        _unrecorded(names, summaries),
    ]
    return serious + [Note(words) for words in found if words]


def _settings(summary: Summary) -> dict[str, str]:
    """Settings that change a result, as text."""
    found: dict[str, Any] = {}
    for group in (*GROUPS, "training"):
        values = summary.config.get(group)
        if isinstance(values, Mapping):
            training = group == "training"
            found |= {
                name: value for name, value in values.items() if decides(name, training=training)
            }
    hidden = ELSEWHERE if summary.data.get("held_out") else TOLD
    idle = OF_CODEC if found.get("codec") == "none" else set()
    return {
        name: "" if value is None else value if isinstance(value, str) else json.dumps(value)
        for name, value in found.items()
        if name not in hidden and name not in idle
    }


# What is compared, and how it is shown; None is not recorded, which differs from nothing.
Shown = tuple[str, str] | None


def _unlike(names: Sequence[str], what: str, values: Sequence[Shown]) -> str | None:
    """`held-out rows differ: easy 20 (3f2a91c0), hard 20 (77bb01d2)`; None where they are alike."""
    who: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for name, value in zip(names, values, strict=True):
        if value is not None:
            who.setdefault(value[0], []).append(name)
            shown.setdefault(*value)
    if len(who) < 2:
        return None
    return f"{what}: " + ", ".join(f"{_few(who[key])} {shown[key]}" for key in who)


def _few(names: Sequence[str]) -> str:
    """The first names; a sweep has dozens."""
    if len(names) <= MOST_NAMES:
        return " and ".join(names)
    return f"{names[0]} and {len(names) - 1} more"


def _text(value: object) -> Shown:
    return str(value), str(value)


def _rows(summary: Summary, part: str) -> Shown:
    """Rows of `data.held_out` or `data.train`, by content."""
    found = summary.data.get(part)
    if not isinstance(found, Mapping) or not found.get("sha256"):
        return None
    digest = str(found["sha256"])
    return digest, f"{figures.count(number(found.get('rows')))} ({digest[:SHORT]})"


def _of_model(summary: Summary, part: str) -> Shown:
    digest = summary.model.get(f"{part}_sha256")
    return None if not digest else (str(digest), str(digest)[:SHORT])


def _base(summary: Summary) -> Shown:
    """By content where that is known, else by name."""
    name = Path(summary.setting("model_name_or_path") or "the embedded model").name
    digest = summary.model.get("base_sha256")
    return (str(digest), f"{name} ({str(digest)[:SHORT]})") if digest else (name, name)


def _ended(summary: Summary) -> Shown:
    reason = summary.ending.reason
    words = f"{summary.status} ({reason})" if reason else summary.status
    return words, words


def _others(summaries: Sequence[Summary], differ: Mapping[str, Sequence[str]]) -> str | None:
    """Settings that differ beside the one that is compared."""
    topics = {name: values for name, values in differ.items() if name not in NAMED_ABOVE}
    compared: set[str] = set()
    if len({summary.setting("strategy") for summary in summaries}) > 1:
        compared = {"strategy_args"}
    elif "codec" in topics:
        compared = {"codec", *OF_CODEC}
    elif len(topics) == 1:
        return None
    told = [f"{key} ({_values(topics[key])})" for key in topics if key not in compared]
    what = "settings differ too" if compared else "several settings differ"
    return f"{what}: {', '.join(told)}" if told else None


def _values(values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(value or "not set" for value in values))
    more = ["..."] if len(distinct) > MOST_NAMES else []
    return ", ".join([*distinct[:MOST_NAMES], *more])


def _unrecorded(names: Sequence[str], summaries: Sequence[Summary]) -> str | None:
    """Runs of earlier versions, and deployments, whose sites keep their rows."""
    missing = [
        name
        for name, summary in zip(names, summaries, strict=True)
        if _rows(summary, "held_out") is None
    ]
    if not missing:
        return None
    return f"held-out rows not recorded: {_few(missing)}; make sure that they are the same"
