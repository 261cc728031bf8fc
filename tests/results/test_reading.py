from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.report import comparison_table, load_rounds, load_summary
from tests.report.made_up import HOSTILE, made_up_summary, write_run


def test_all_arms_are_read(run_dir: Path):
    summary = load_summary(run_dir)
    assert set(summary.arms) == {
        "federated",
        "centralized",
        "centralized_large_batch",
        "local",
        "fixed_global",
    }
    assert (summary.rounds, summary.seeds) == (10, 3)
    assert len(summary.federated.mean.eval_loss) == 11
    assert summary.federated.mean.train_loss[0] is None
    assert len(summary.arms["local"].clients) == 4
    assert summary.clients[0].client == HOSTILE
    assert summary.verdict.parity is not None
    assert summary.verdict.parity.identical


def test_settings_are_found_by_flag_name(run_dir: Path):
    summary = load_summary(run_dir)
    assert summary.setting("strategy") == "fedprox+fedadam"
    assert summary.setting("num_clients") == "4"
    assert summary.setting("federation") is None
    assert summary.setting("no_such_flag") is None


def test_what_is_no_finite_number_is_none(tmp_path: Path):
    raw = {"arms": {"federated": {"eval_loss": [2.0, float("nan"), float("inf"), "x", True, 1]}}}
    loss = load_summary(write_run(tmp_path, raw, [])).federated.mean.eval_loss
    assert loss == (2.0, None, None, None, None, 1.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "expected JSON"),
        ("[]", 'expected an object with "arms"'),
        ('{"arms": []}', 'expected an object with "arms"'),
        ('{"arms": {"local": {"eval_loss": [1]}}}', 'an arm "federated" with "eval_loss"'),
        ('{"arms": {"federated": {"eval_loss": []}}}', 'an arm "federated" with "eval_loss"'),
        ('{"arms": {"federated": 3}}', 'arm "federated" to be an object'),
    ],
)
def test_unknown_shape_is_an_error_that_names_the_file(tmp_path: Path, content: str, expected: str):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(FedtuneError, match=expected) as caught:
        load_summary(tmp_path)
    assert "summary.json" in str(caught.value)


def test_no_summary_is_an_error(tmp_path: Path):
    with pytest.raises(FedtuneError, match="found no summary.json"):
        load_summary(tmp_path / "nowhere")


def test_rounds_are_read(run_dir: Path):
    rows = load_rounds(run_dir)
    assert [row.round for row in rows] == list(range(1, 11))
    ((attempt, refusal),) = rows[3].refusals
    assert refusal.who == f"{HOSTILE}, node 17"
    assert (len(rows[3].replies), attempt) == (3, 1)
    ((attempt, _),) = rows[6].refusals
    assert (rows[6].attempt, attempt) == (2, 1)
    assert list(rows[0].time) == ["train", "wait", "codec", "aggregate"]


def test_rounds_of_the_first_seed_when_there_are_several(tmp_path: Path):
    for seed in (10, 2):
        write_run(tmp_path / "seeds" / str(seed), {}, [{"round": 1, "eval_loss": seed}])
    assert [row.eval_loss for row in load_rounds(tmp_path)] == [2.0]


def test_other_lists_of_an_arm_are_task_metrics(tmp_path: Path):
    federated = {"eval_loss": [2.0, 1.0], "accuracy": [0.1, 0.0], "note": ["x"], "time": [{}]}
    run = write_run(tmp_path, {"arms": {"federated": federated}}, [])
    summary = load_summary(run)
    assert summary.federated.mean.metrics == {"accuracy": (0.1, 0.0)}
    header, _, line = comparison_table(summary).splitlines()
    assert (header.split()[-1], line.split()[-1]) == ("accuracy", "0.000")


def test_half_a_last_line_is_left_out_and_half_a_first_is_an_error(tmp_path: Path):
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 1}\n{"round": 2, "ev')
    assert [row.round for row in load_rounds(tmp_path)] == [1]
    path.write_text('{"rou\n{"round": 2}\n')
    with pytest.raises(FedtuneError, match="line 1"):
        load_rounds(tmp_path)
    assert load_rounds(tmp_path / "nowhere") == []


def test_summary_of_one_round_and_of_no_round(tmp_path: Path):
    assert load_summary(write_run(tmp_path / "a", made_up_summary(1), [])).rounds == 1
    nothing = {"arms": {"federated": {"eval_loss": [2.9]}}}
    assert load_summary(write_run(tmp_path / "b", nothing, [])).rounds == 0


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "transformers", "flwr", "matplotlib", "accelerate", "mlflow", "wandb", "rich"]
    code = f"import sys, fedtune.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_made_up_summary_is_plain_json():
    assert json.loads(json.dumps(made_up_summary())) == made_up_summary()
