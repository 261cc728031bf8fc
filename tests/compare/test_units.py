"""The arithmetic of the comparison, on numbers worked out by hand or by simulation."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.compare.gaps import first_difference, spread, verdict
from fedtune.results.series import KEYS, Series
from fedtune.results.verdict import Parity


def test_spread_is_mean_and_sample_deviation() -> None:
    assert asdict(spread([2.0, 4.0, 9.0])) == {
        "mean": 5.0,
        "std": pytest.approx(statistics.stdev([2.0, 4.0, 9.0])),
    }
    assert asdict(spread([3.0])) == {"mean": 3.0, "std": None}
    assert asdict(spread([3.0, 3.0])) == {"mean": 3.0, "std": 0.0}


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_spread_agrees_with_the_standard_library(values: list[float]) -> None:
    """Two-pass fp64 on at most 9 values: relative 1e-9 of the largest leaves a wide margin; squares
    of what is below 1e-154 vanish.
    """
    result = asdict(spread(values))
    scale = max(map(abs, values)) * 1e-9
    assert result["mean"] == pytest.approx(statistics.mean(values), abs=scale)
    assert result["std"] == pytest.approx(statistics.stdev(values), abs=scale + 1e-100, rel=1e-6)


def mean_series(runs: list[dict[str, list[float | None]]]) -> dict[str, list[float | None]]:
    return Series.mean([Series.from_json(run) for run in runs]).to_json()


def test_mean_series_is_element_wise() -> None:
    runs = [
        {"eval_loss": [3.0, 2.0], "train_loss": [None, 2.0], "samples": [0, 24]},
        {"eval_loss": [4.0, 1.0], "train_loss": [None, None], "samples": [0, 24]},
    ]
    mean = mean_series(runs)
    assert mean == {"eval_loss": [3.5, 1.5], "train_loss": [None, None], "samples": [0, 24]}
    assert isinstance(mean["samples"][1], int)
    assert mean_series(runs[:1]) == runs[0]


def test_series_of_unequal_length_are_no_mean() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        mean_series([{"eval_loss": [1.0, 2.0]}, {"eval_loss": [1.0]}])


def test_columns_of_a_history() -> None:
    history = [
        {"round": 0, "eval_loss": 3.0, "eval_metrics": {"eval_f1": 0.5}, "samples": 0},
        {"round": 1, "eval_loss": 2.0, "eval_metrics": None, "samples": 8, "bytes_up": 7},
    ]
    series = Series.of_history(history).to_json()
    assert set(series) == {*KEYS, "eval_f1"}
    assert series["eval_loss"] == [3.0, 2.0]
    assert series["bytes_up"] == [0, 7]
    assert series["tokens"] == [None, None]
    assert series["eval_f1"] == [0.5, None]


def entry(step: int, loss: float, lr: float = 0.1, norm: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss": loss, "learning_rate": lr, "grad_norm": norm, "epoch": 0.5}


LOG = [entry(1, 3.0), entry(2, 2.0), {"step": 2, "eval_loss": 9.0}, entry(3, 1.0)]


@pytest.mark.parametrize(
    ("other", "step"),
    [
        (LOG, None),
        ([*LOG, {"step": 3, "train_runtime": 1.0}], None),
        ([e for e in LOG if "loss" in e], None),
        (LOG[:-1], 3),
        ([*LOG, entry(4, 0.5)], 4),
        ([entry(1, 3.0), entry(2, math.nextafter(2.0, 3.0)), entry(3, 0.0)], 2),
        ([entry(1, 3.0), entry(2, 2.0, lr=0.2), entry(3, 1.0)], 2),
        ([entry(1, 3.0, norm=1.1), entry(2, 2.0), entry(3, 1.0)], 1),
        ([], 1),
    ],
    ids=["same", "summary", "no-eval", "short", "long", "last-bit", "lr", "norm", "nothing"],
)
def test_first_difference(other: list[dict[str, float]], step: int | None) -> None:
    assert first_difference(LOG, other) == step
    assert first_difference(other, LOG) == step


def arm(*losses: float, up: int = 0, down: int = 0) -> Series:
    columns = {
        "eval_loss": list(losses),
        "bytes_up": [5, *[up] * (len(losses) - 1)],
        "bytes_down": [7, *[down] * (len(losses) - 1)],
    }
    return Series.from_json(columns)


def test_verdict_by_hand() -> None:
    """Two seeds; gaps 10 % and -10 %, gains 50 % and 10 %."""
    rows = verdict(
        {
            "federated": [arm(4, 3, 1.1, up=30, down=20), arm(4, 3, 1.8, up=30, down=20)],
            "centralized": [arm(4, 1.0), arm(4, 2.0)],
            "local": [arm(4, 2.2), arm(4, 2.0)],
        },
        parity=Parity(True),
        full_bytes=1000,
        time_split={"train": 2.0},
        equal_samples={"centralized": False},
    ).to_json()
    assert rows["equal_samples"] == {"centralized": False}
    assert rows["gap_centralized_pct"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert rows["gap_centralized_pct"]["std"] == pytest.approx(math.sqrt(200))
    assert rows["gain_over_local_pct"]["mean"] == pytest.approx(30.0)
    assert rows["gap_large_batch_pct"] is None
    assert rows["bytes_ratio_full"] == pytest.approx(100 / 2000)  # entry 0 is no round
    assert rows["parity"] == {"identical": True, "first_diff_step": None}
    json.dumps(rows, allow_nan=False)


def test_verdict_of_a_federated_arm_alone() -> None:
    found = verdict({"federated": [arm(4, 3)]}, parity=None, full_bytes=0, time_split={})
    rows = found.to_json()
    assert rows["gap_centralized_pct"] is rows["gain_over_local_pct"] is rows["parity"] is None
    assert rows["bytes_ratio_full"] is None
