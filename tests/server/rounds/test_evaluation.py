"""The global's score: every metric weighted by what it is a mean over."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.errors import RoundError
from fedtune.server.rounds.evaluation import MOST_METRICS, mean_scores
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_metric_that_is_not_finite_is_null_and_has_no_mean(value: float) -> None:
    """An F1 over a class without rows; the others' scores, and the loss, stand."""
    odd = reply(1, eval_loss=1.0, eval_f1=value, num_examples=10)
    even = reply(2, eval_loss=3.0, eval_f1=0.5, num_examples=10)
    found, own = mean_scores(1, [odd, even], {1: "a", 2: "b"}, needed=True)
    assert found["eval_loss"] == 2.0
    assert not math.isfinite(found["eval_f1"])  # type: ignore[arg-type]
    assert own == [
        {"client": "a", "eval_loss": 1.0, "eval_f1": None},
        {"client": "b", "eval_loss": 3.0, "eval_f1": 0.5},
    ]


def test_a_reply_cannot_take_another_name_nor_more_than_a_record_is_meant_for() -> None:
    many = {f"eval_m{k:03d}": float(k) for k in range(1000)}
    odd = {"client": 7.0, "\x1b]0;title": 1.0, "a b": 1.0, "x" * 65: 1.0, "": 1.0}
    given = reply(1, zeta=1.0, eval_loss=1.0, num_examples=10, **many, **odd)
    _, ((own),) = mean_scores(1, [given], {1: "a"}, needed=True)
    assert own["client"] == "a"
    assert len(own) == MOST_METRICS + 1
    assert own["eval_loss"] == 1.0  # comes first, whatever else there is
    assert not odd.keys() & own.keys() - {"client"}


@pytest.mark.parametrize("count", [-1, -1e9, 1e30, 2**53, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["num_examples", "num_tokens", "num_tokens__eval_x"])
def test_a_weight_that_is_no_count_is_no_score(name: str, count: float) -> None:
    """Negative ones would turn the mean around, huge ones be all of it."""
    odd = reply(1, eval_loss=-5.0, **{"num_examples": 10, name: count})
    assert mean(odd, reply(2, eval_loss=2.0, num_examples=10)) == {"eval_loss": 2.0}
    with pytest.raises(RoundError, match="a: num-.*expected 0 to 9007199254740991"):
        mean(odd)
