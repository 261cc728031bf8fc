"""What of `--codec` and its companions a run uses: which tensors are coded, how, and which way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, get_args, get_type_hints

from fedtune.adapters import Entry
from fedtune.config import TransportArguments
from fedtune.errors import ConfigError, FrameError
from fedtune.lists import split_names
from fedtune.nearest import nearest

__all__ = ["CodecSettings"]

HINTS = get_type_hints(TransportArguments)
FLAGS = {"codec": "codec", "on": "codec_on", "direction": "codec_direction"}
CHOICES = {name: get_args(HINTS[flag]) for name, flag in FLAGS.items()}
FOUR_BITS = ("nf4", "fp4")
EXAMPLE = "Example: include=*lora_A*,min_size=256"


@dataclass(frozen=True)
class CodecSettings:
    """Quantized transport of one run; the defaults are none.

    Attributes:
        codec: key of `CODECS`.
        on: `delta` or `weights`.
        direction: `both`, `up` or `down`.
        feedback: whether a client adds to an update what the codec lost of its last one.
        include: globs; a tensor needs one of them, if there are any.
        exclude: globs; a tensor has none of them.
        min_size: fewest values of a tensor that is coded.
    """

    codec: str = "none"
    on: str = "delta"
    direction: str = "both"
    feedback: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_size: int = 256

    @property
    def up(self) -> str:
        """Codec of what clients send."""
        return "none" if self.direction == "down" else self.codec

    @property
    def down(self) -> str:
        """Codec of what clients receive."""
        return "none" if self.direction == "up" else self.codec

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of floats is coded."""
        if len(shape) < 2 or math.prod(shape) < self.min_size:
            return False
        named = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return named and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def check_use(self, entries: Mapping[str, Entry]) -> None:
        """Raises ConfigError when none of the trained tensors is coded."""
        shapes = {name: entry.shape for name, entry in entries.items()}
        if self.codec == "none" or any(self.takes(*item) for item in shapes.items()) or not shapes:
            return
        largest = max(shapes, key=lambda name: math.prod(shapes[name]))
        raise ConfigError(
            f"--codec {self.codec}: expected a trained tensor that is coded, received {len(shapes)}"
            f" that are not, such as {largest} {list(shapes[largest])}. It needs two dimensions, "
            f"{self.min_size} values and a name that --codec_args takes."
        )

    @classmethod
    def of(cls, transport: TransportArguments, *, refactors: bool) -> CodecSettings:
        """The settings that the flags ask for; raises ConfigError on bad `--codec_args`.

        Error feedback is on by default where an update loses much and the next one is of the same
        factors: not where the method `refactors`.
        """
        settings = cls(
            codec=transport.codec,
            on=transport.codec_on,
            direction=transport.codec_direction,
            **_codec_args(transport.codec_args),
        )
        feedback = transport.error_feedback
        if feedback is None:
            feedback = settings.up in FOUR_BITS and settings.on == "delta" and not refactors
        return replace(settings, feedback=feedback)

    def record(self) -> dict[str, str | int | bool | list[str]]:
        """As values of a Flower ConfigRecord, which has lists but no tuples."""
        return {**asdict(self), "include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CodecSettings:
        """Inverse of `record`; other keys are left alone.

        Raises:
            FrameError: a key is missing, or its value is not one that a flag can have.
        """
        default = cls().record()
        plain: dict[str, Any] = {name: record.get(name) for name in default}
        wrong = [name for name, value in plain.items() if type(value) is not type(default[name])]
        wrong += [name for name, choices in CHOICES.items() if plain[name] not in choices]
        if wrong or plain["min_size"] < 1:
            name = (wrong or ["min_size"])[0]
            raise FrameError(
                f"codec record: expected `{name}` as --codec and its companions set it, received "
                f"{plain[name]!r}. Use the same fedtune on both sides."
            )
        globs = {name: tuple(map(str, record[name])) for name in ("include", "exclude")}
        return cls(**{**plain, **globs})


def _codec_args(text: str | None) -> dict[str, Any]:
    """`--codec_args` as fields; "include=*A*" -> {"include": ("*A*",), "exclude": ()}."""
    given: dict[str, list[str]] = {"include": [], "exclude": [], "min_size": []}
    for pair in split_names(text):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name not in given or not value:
            hint = EXAMPLE if name in given else nearest(name, given)
            raise ConfigError(
                "--codec_args: expected include=GLOB, exclude=GLOB or min_size=N, joined by "
                f"commas, received {pair!r}. {hint}"
            )
        given[name].append(value)
    sizes = given.pop("min_size")
    globs = {name: tuple(values) for name, values in given.items()}
    if len(sizes) > 1:
        raise ConfigError("--codec_args: min_size is given twice. Keep one of them.")
    return {**globs, **({"min_size": _size(sizes[0])} if sizes else {})}


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"--codec_args: min_size: expected a whole number >= 1, received {text!r}. {EXAMPLE}"
        )
    return int(text)
