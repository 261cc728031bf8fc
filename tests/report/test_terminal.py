from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.report import Summary, comparison_table, load_summary, verdict_lines
from fedtune.report.findings import headline
from tests.report.made_up import made_up_summary, write_run


def load(directory: Path, raw: dict[str, Any]) -> Summary:
    return load_summary(write_run(directory, raw, []))


def test_the_table_has_every_arm_and_aligned_columns(run_dir: Path):
    lines = comparison_table(load_summary(run_dir)).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:]] == [
        "federated",
        "centralized",
        "centralized, large batch",
        "local only",
        "fixed global (control)",
    ]
    assert len({len(line) for line in lines}) == 1
    assert "25,600" in lines[2]
    assert "2.912" in lines[2]


def test_totals_and_best_round(tmp_path: Path):
    federated = {
        "eval_loss": [4.0, 3.0, 2.0, 2.5],
        "samples": [0, 10, 20, 30],
        "bytes_up": [0, 1_000_000, 1_000_000, 1_000_000],
        "bytes_down": [500_000, 0, 0, 0],
        "wall_s": [0.5, 1, 1, 1],
    }
    line = comparison_table(load(tmp_path, {"arms": {"federated": federated}})).splitlines()[-1]
    assert line.split() == [
        "federated",
        "4.000",
        "2.500",
        "2.000",
        "(2)",
        "30",
        "3.00",
        "0.50",
        "3.50",
    ]


def test_verdict_in_words(tmp_path: Path):
    raw = made_up_summary()
    raw["arms"]["federated"]["eval_loss"][-1] = 2.451
    raw["arms"]["centralized"]["eval_loss"][-1] = 2.419
    raw["verdict"]["gap_centralized_pct"] = {"mean": 1.3, "std": 0.4}
    lines = verdict_lines(load(tmp_path, raw))
    assert lines[0] == (
        "federated 2.451 vs centralized 2.419 at equal samples: gap +1.3 % (± 0.4 over 3 seeds)"
    )
    text = "\n".join(lines)
    assert "local only" in text
    assert "Fixed-global control: flat at 2.912 over all 10 rounds" in text
    assert "One-client parity: identical" in text
    assert "bytes: 0.4 % of exchanging the full model" in text
    assert "train 83 %" in text


@pytest.mark.parametrize(
    ("equal", "words"), [(True, "at equal samples"), (False, "at 25,600 samples against 112")]
)
def test_samples_are_called_equal_only_where_they_are(tmp_path: Path, equal: bool, words: str):
    raw = made_up_summary()
    raw["arms"]["centralized"]["samples"][-1] = 112
    unknown = verdict_lines(load(tmp_path, raw))[0]
    raw["verdict"]["equal_samples"] = {"centralized": equal}
    assert words in verdict_lines(load(tmp_path, raw))[0]
    assert "at 25,600 samples against 112" in unknown  # of an earlier version


def test_without_a_comparison_the_loss_is_the_verdict(tmp_path: Path):
    lines = verdict_lines(load(tmp_path, {"arms": {"federated": {"eval_loss": [2.9, 2.5]}}}))
    assert lines == ["Federated training lowers held-out loss: 2.900 to 2.500 in 1 round."]


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ({"mean": 1.3, "std": 0.4}, "ends 1.3 % above centralized"),
        ({"mean": -1.3, "std": 0.4}, "ends 1.3 % below centralized"),
        ({"mean": 0.3, "std": 0.4}, "No measurable gap"),
        ({"mean": 0.3, "std": None}, "ends 0.3 % above centralized"),
        ({"mean": None, "std": None}, "centralized large batch at equal samples"),
        (float("nan"), "centralized large batch at equal samples"),
    ],
)
def test_headline(tmp_path: Path, gap: object, words: str):
    raw = made_up_summary()
    raw["verdict"]["gap_centralized_pct"] = gap
    assert words in headline(load(tmp_path, raw))


def test_without_a_gap_the_loss_is_told_from_the_base_model(tmp_path: Path):
    """Not from the initial adapter, which with a prompt method is worse than the base."""
    raw = {"base_loss": 2.7, "arms": {"federated": {"eval_loss": [4.9, 2.5]}}}
    assert "lowers held-out loss: 2.700 to 2.500 in 1 round" in headline(load(tmp_path, raw))


def test_a_failed_control_is_said(tmp_path: Path):
    raw = made_up_summary()
    raw["arms"]["fixed_global"]["eval_loss"][5] += 0.05
    raw["verdict"]["parity"] = {"identical": False, "first_diff_step": 17}
    text = "\n".join(verdict_lines(load(tmp_path, raw)))
    assert "control: moves by 0.0500" in text or "control: moves by 0.05" in text
    assert "differs from the plain Trainer, first at step 17" in text


def test_an_arm_that_diverged_has_no_final_loss(tmp_path: Path):
    """Neither the loss before training nor that of an earlier round stands in for it."""
    arms = {"federated": {"eval_loss": [2.9, 2.6, 2.5]}, "centralized": {"eval_loss": [2.9, 2.7]}}
    arms["centralized"]["eval_loss"].append(None)
    summary = load(tmp_path, {"arms": arms})
    line = comparison_table(summary).splitlines()[-1]
    assert line.split() == ["centralized", "2.900", "–", "2.700", "(1)", *["–"] * 4]
    assert "centralized: diverged, no final loss" in verdict_lines(summary)


def test_missing_numbers_are_dashes(tmp_path: Path):
    raw = {"arms": {"federated": {"eval_loss": [None, None]}}}
    summary = load(tmp_path, raw)
    assert comparison_table(summary).splitlines()[-1].split() == ["federated", *["–"] * 7]
    assert verdict_lines(summary) == ["No held-out loss was recorded in 1 round."]
