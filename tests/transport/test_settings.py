"""`--codec` and its companions: from flags and YAML to what a run uses, and through a message."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from fedtune.adapters import Entry
from fedtune.config import TransportArguments
from fedtune.errors import ConfigError
from fedtune.settings import parse_arguments
from fedtune.transport.codecs import CODECS
from fedtune.transport.settings import CodecSettings

MATRIX = (16, 16)


def parsed(*argv: str, recipe: Path | None = None) -> TransportArguments:
    return parse_arguments(TrainingArguments, argv, recipe_file=recipe).transport


def settings(*, refactors: bool = False, **flags: Any) -> CodecSettings:
    return CodecSettings.of(TransportArguments(**flags), refactors=refactors)


def test_the_flag_names_every_codec() -> None:
    assert get_args(get_type_hints(TransportArguments)["codec"]) == tuple(CODECS)


def test_the_defaults_are_those_of_the_flags() -> None:
    assert settings() == CodecSettings()
    assert parsed() == TransportArguments()


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], None),
        (["--error_feedback"], True),
        (["--error_feedback", "true"], True),
        (["--error_feedback", "false"], False),
        (["--error_feedback=false"], False),
        (["--error_feedback", "--codec", "nf4"], True),
    ],
)
def test_error_feedback_as_a_flag(argv: list[str], value: bool | None) -> None:
    assert parsed(*argv).error_feedback is value


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("null", None)])
def test_error_feedback_in_yaml(text: str, value: bool | None, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"error_feedback: {text}\n")
    assert parsed(recipe=tmp_path / "job.py").error_feedback is value


@pytest.mark.parametrize(
    "text",
    [
        "include=*A*,include=*B*,min_size=9",
        '{include: ["*A*", "*B*"], min_size: 9}',
        '["include=*A*", "include=*B*", "min_size=9"]',
    ],
)
def test_codec_args_in_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"codec: none\ncodec_args: {text}\n")
    given = parsed(recipe=tmp_path / "job.py")
    assert (given.codec, given.codec_args) == ("none", "include=*A*,include=*B*,min_size=9")


def test_codec_none_drops_what_the_yaml_says_of_a_codec(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("codec: nf4\ncodec_on: weights\ncodec_args: min_size=9\n")
    recipe = tmp_path / "job.py"
    assert parsed("--codec", "none", recipe=recipe) == TransportArguments()
    kept = parsed("--codec", "int8", recipe=recipe)
    assert (kept.codec, kept.codec_on, kept.codec_args) == ("int8", "weights", "min_size=9")


@pytest.mark.parametrize(
    ("direction", "up", "down"),
    [("both", "int8", "int8"), ("up", "int8", "none"), ("down", "none", "int8")],
)
def test_directions(direction: str, up: str, down: str) -> None:
    given = settings(codec="int8", codec_direction=direction)
    assert (given.up, given.down) == (up, down)


@pytest.mark.parametrize("codec", list(CODECS))
def test_feedback_is_for_what_loses_much_of_a_delta_on_its_way_up(codec: str) -> None:
    loses = codec in ("nf4", "fp4")
    assert settings(codec=codec).feedback is loses
    assert settings(codec=codec, codec_direction="up").feedback is loses
    assert not settings(codec=codec, codec_direction="down").feedback
    assert not settings(codec=codec, codec_on="weights").feedback
    assert not settings(codec=codec, refactors=True).feedback
    assert settings(codec=codec, error_feedback=True).feedback
    assert not settings(codec=codec, error_feedback=False).feedback


@pytest.mark.parametrize(
    ("codec_args", "taken"),
    [
        (None, {"l.lora_A.weight", "l.lora_B.weight", "l.norm.weight"}),
        ("include=*lora_A*", {"l.lora_A.weight"}),
        ("include=*lora_A*, include=*norm*", {"l.lora_A.weight", "l.norm.weight"}),
        ("exclude=*lora*", {"l.norm.weight"}),
        ("include=l.*,exclude=*norm*", {"l.lora_A.weight", "l.lora_B.weight"}),
        ("include=*LORA_A*", set()),
        ("include=lora_A", set()),
        ("include=*lora_[AC]*,min_size=256", {"l.lora_A.weight"}),
        ("min_size=257", set()),
    ],
)
def test_which_tensors_are_coded(codec_args: str | None, taken: set[str]) -> None:
    names = ("l.lora_A.weight", "l.lora_B.weight", "l.norm.weight")
    given = settings(codec="nf4", codec_args=codec_args)
    assert {name for name in names if given.takes(name, MATRIX)} == taken


@pytest.mark.parametrize(
    ("shape", "taken"),
    [((256,), False), ((), False), ((1, 255), False), ((1, 256), True), ((0, 256), False)],
)
def test_small_and_one_dimensional_tensors_are_not(shape: tuple[int, ...], taken: bool) -> None:
    assert settings(codec="nf4").takes("x", shape) is taken
    assert not settings(codec="nf4", codec_args="min_size=1").takes("x", (10_000,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inclde=*A*", "received 'inclde=*A*'. Did you mean include?"),
        ("*A*", "received '*A*'. Known: exclude, include, min_size."),
        ("=*A*", "received '=*A*'. Known:"),
        ("include", "received 'include'. Example: include="),
        ("include=*A*,exclude=", "received 'exclude='. Example: include="),
        ("min_size=0", "min_size: expected a whole number >= 1, received '0'. Example:"),
        ("min_size=-1", "received '-1'"),
        ("min_size=2.5", "received '2.5'"),
        ("min_size=1e3", "received '1e3'"),
        ("min_size=1,min_size=2", "min_size is given twice. Keep one of them."),
    ],
)
def test_bad_codec_args(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(codec="nf4", codec_args=text)
    assert str(caught.value).startswith("--codec_args: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


GLOBS = st.lists(st.text(min_size=1), max_size=3).map(tuple)


@given(
    st.builds(
        CodecSettings,
        codec=st.sampled_from(list(CODECS)),
        on=st.sampled_from(["delta", "weights"]),
        direction=st.sampled_from(["both", "up", "down"]),
        feedback=st.booleans(),
        include=GLOBS,
        exclude=GLOBS,
        min_size=st.integers(1, 2**62),
    )
)
def test_a_record_is_read_as_it_was_written_on_the_wire(given: CodecSettings) -> None:
    """Through Flower's own bytes, empty lists included, and among keys of others."""
    sent = ConfigRecord({**given.record(), "run": "a"})
    assert CodecSettings.from_record(ConfigRecord.inflate(sent.deflate())) == given


def test_every_field_travels() -> None:
    assert set(CodecSettings().record()) == {f.name for f in dataclasses.fields(CodecSettings)}


@pytest.mark.parametrize("codec_args", ["include=*lora_C*", "exclude=*", "min_size=4097"])
def test_a_codec_that_codes_nothing_is_refused(codec_args: str) -> None:
    entries = {
        "q.lora_A": Entry((8, 512), "float32"),
        "q.lora_B": Entry((64, 8), "float32"),
        "bias": Entry((10**6,), "float32"),
    }
    settings(codec="nf4").check_use(entries)
    settings(codec="nf4", codec_args="min_size=4096").check_use(entries)
    settings().check_use({})
    expected = r"^--codec nf4: expected .* received 3 that are not, such as bias \[1000000\]\. "
    with pytest.raises(ConfigError, match=expected):
        settings(codec="nf4", codec_args=codec_args).check_use(entries)
