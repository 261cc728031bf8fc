"""What `summary.json` says of the codec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from fedtune.compare.compose import build_summary
from fedtune.compare.facts import Facts
from fedtune.config import FederationArguments, TransportArguments

FEDERATED = {
    "eval_loss": [3.0, 2.0],
    "bytes_up": [0, 1],
    "bytes_down": [1, 1],
    "time": [{"train": 1.0}],
}


def of_codec(strategy: str = "fedavg", **transport: Any) -> dict[str, Any]:
    federation = asdict(FederationArguments(strategy=strategy))
    config = {"federation": federation, "transport": asdict(TransportArguments(**transport))}
    built = build_summary(Facts(config=config, seeds=[1]), [{"federated": FEDERATED}])
    summary = built.to_json()
    return {key: value for key, value in summary.items() if "codec" in key or "feedback" in key}


def test_without_a_codec_there_is_nothing_to_say() -> None:
    assert of_codec() == {"codec": "none"}


@pytest.mark.parametrize(("strategy", "feedback"), [("fedavg", True), ("flexlora", False)])
def test_the_codec_and_feedback_as_they_were(strategy: str, feedback: bool) -> None:
    assert of_codec(strategy, codec="nf4", codec_args="min_size=9") == {
        "codec": "nf4",
        "codec_on": "delta",
        "codec_direction": "both",
        "error_feedback": feedback,
        "codec_args": "min_size=9",
    }
