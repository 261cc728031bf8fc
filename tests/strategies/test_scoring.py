"""The global's score: every metric weighted by what it is a mean over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.strategies.scoring import mean_scores
from fedtune.transport.messages import pack


def reply(node: int, **metrics: float) -> Any:
    names = {key.replace("__", ":").replace("num_", "num-"): v for key, v in metrics.items()}
    content = pack(metrics=names, config={"round": 1})
    return SimpleNamespace(
        metadata=SimpleNamespace(src_node_id=node), content=content, has_error=lambda: False
    )


def mean(*replies: Any) -> dict[str, float]:
    found, _ = mean_scores(1, replies, {1: "a", 2: "b"}, needed=True)
    return {key: float(value) for key, value in found.items()}  # type: ignore[arg-type]


def test_losses_count_by_tokens_and_accuracies_by_rows() -> None:
    one = reply(1, eval_loss=1.0, eval_accuracy=1.0, num_examples=30, num_tokens=100)
    two = reply(2, eval_loss=2.0, eval_accuracy=0.0, num_examples=10, num_tokens=900)
    assert mean(one, two) == pytest.approx({"eval_loss": 1.9, "eval_accuracy": 0.75})


def test_without_tokens_losses_count_by_rows() -> None:
    one = reply(1, eval_loss=1.0, num_examples=30, num_tokens=0)
    two = reply(2, eval_loss=2.0, num_examples=10, num_tokens=0)
    assert mean(one, two) == pytest.approx({"eval_loss": 1.25})


def test_a_set_counts_by_its_own_size() -> None:
    """Of two held-out sets, where one site has much of the one and little of the other."""
    counts = {"num_examples": 2, "num_tokens": 100}
    names = ("eval_x", "eval_x_long")
    one = {f"num_tokens__{name}": size for name, size in zip(names, (90, 10), strict=True)}
    two = {f"num_tokens__{name}": size for name, size in zip(names, (10, 90), strict=True)}
    found = mean(
        reply(1, eval_loss=1.0, eval_x_loss=1.0, eval_x_long_loss=1.0, **counts, **one),
        reply(2, eval_loss=2.0, eval_x_loss=2.0, eval_x_long_loss=2.0, **counts, **two),
    )
    expected = {"eval_loss": 1.5, "eval_x_loss": 1.1, "eval_x_long_loss": 1.9}
    assert found == pytest.approx(expected)
