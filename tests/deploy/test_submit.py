"""The flags of `fedtune submit` become what the server is told."""

from __future__ import annotations

import argparse

import pytest

from fedtune.config import FederationArguments, TransportArguments
from fedtune.deploy import submit


def parsed(*words):
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    return parser.parse_args(words)


def checked(*words):
    return submit._checked(parsed(*words))


def test_without_flags_all_is_as_ever():
    assert checked() == (FederationArguments(num_clients=2), TransportArguments())


def test_flags_of_every_type():
    federation, transport = checked(
        *("--num_rounds", "9", "--epochs_per_round", "0.5", "--weight_by", "uniform"),
        *("--codec", "fp4", "--codec_direction", "up", "--codec_args", "include=*A*,min_size=9"),
    )
    assert (federation.num_rounds, federation.epochs_per_round) == (9, 0.5)
    assert federation.weight_by == "uniform"
    assert transport == TransportArguments(
        codec="fp4", codec_direction="up", codec_args="include=*A*,min_size=9"
    )


@pytest.mark.parametrize(
    ("words", "value"), [([], True), (["true"], True), (["False"], False), (["false"], False)]
)
def test_true_and_false(words, value):
    _, transport = checked("--codec", "nf4", "--error_feedback", *words)
    assert transport.error_feedback is value


def test_a_resumed_run_must_share_the_codec():
    one, other = (
        submit._settings(args, *submit._checked(args))
        for args in (parsed(), parsed("--codec", "int8"))
    )
    assert (one.pop("codec"), other.pop("codec")) == ("none", "int8")
    assert one == other
