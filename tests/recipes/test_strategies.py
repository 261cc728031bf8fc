"""`--strategy a,b,c` in one command: whole runs side by side, shared arms, one that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from tests.recipes.runs import TINY, Done, recipe, run_here

SCRIPT = recipe("lora_sft")
ARMS = ("centralized", "local", "fixed_global")


def run(*flags: str | Path) -> Done:
    return run_here(SCRIPT, *TINY, *flags)


def summary_of(directory: Path) -> Any:
    return json.loads((directory / "summary.json").read_text())


def losses(directory: Path, arm: str) -> Any:
    return summary_of(directory)["arms"][arm]["eval_loss"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    out = tmp_path_factory.mktemp("several") / "out"
    flags = ("--strategy", "fedavg,ffa_lora+fedadam", "--strategy_args", "lr=0.01")
    return out, run(*flags, "--compare", ",".join(ARMS), "--output_dir", out)


def test_each_is_a_whole_run_and_the_top_has_the_table(several: tuple[Path, Done]):
    out, done = several
    assert done.status == 0, done.err
    for name in ("fedavg", "ffa_lora+fedadam"):
        inside = {path.name for path in (out / "strategies" / name).iterdir()}
        assert {"summary.json", "rounds.jsonl", "adapter", "best", "report.html"} <= inside
    top = summary_of(out)
    assert (top["status"], set(top["arms"])) == ("completed", set(ARMS))
    assert [row["strategy"] for row in top["runs"]] == ["fedavg", "ffa_lora+fedadam"]
    for row in top["runs"]:
        assert row["final_loss"] == losses(out / "strategies" / row["run"], "federated")[-1]
    assert "vs fedavg %" in done.out
    assert done.out.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert "2 strategies on the same rows" in (out / "report.html").read_text()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    settings = [json.loads((out / "strategies" / row["run"] / "run.json").read_text())["settings"]
                for row in top["runs"]]  # fmt: skip
    assert [one["strategy_args"] for one in settings] == [None, "lr=0.01"]


def test_shared_arms_are_those_of_a_run_alone(several: tuple[Path, Done], tmp_path: Path):
    """Run once, in the top level, and to the bit what the second strategy alone would have had."""
    out, done = several
    second = out / "strategies" / "ffa_lora+fedadam"
    for arm in ARMS:
        assert (out / "arms" / arm / "adapter" / "adapter_config.json").is_file()
        assert not (second / "arms" / arm / "adapter").exists()
        assert losses(second, arm) == losses(out / "strategies" / "fedavg", arm)
    alone = tmp_path / "alone"
    flags = ("--strategy", "ffa_lora+fedadam", "--strategy_args", "lr=0.01")
    assert run(*flags, "--compare", ",".join(ARMS), "--output_dir", alone).status == 0
    for arm in ("federated", *ARMS):
        assert losses(alone, arm) == losses(second, arm)
    assert (
        summary_of(alone)["verdict"]["gap_centralized_pct"]
        == (summary_of(second)["verdict"]["gap_centralized_pct"])
    )


def test_a_finished_one_is_compared_resumed_and_guarded(
    several: tuple[Path, Done], capsys: pytest.CaptureFixture[str]
):
    out, _ = several
    assert main(["compare", str(out), "--format", "json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]] == [
        "fedavg",
        "ffa_lora+fedadam",
    ]
    flags = ("--strategy", "fedavg,ffa_lora+fedadam", "--strategy_args", "lr=0.01")
    used = run(*flags, "--output_dir", out)
    assert used.status == 2
    assert "holds an earlier run" in used.errors[-1]
    before = losses(out / "strategies" / "fedavg", "federated")
    again = run(*flags, "--compare", ",".join(ARMS), "--resume", "--output_dir", out)
    assert again.status == 0, again.err
    assert losses(out / "strategies" / "fedavg", "federated") == before


def test_one_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: Any):
    import fedtune.run.seeds
    from fedtune.errors import RoundError

    real = fedtune.run.seeds.federate

    def federate(args: Any, *others: Any) -> Any:
        if args.federation.strategy == "fedprox":
            raise RoundError("no good updates")
        return real(args, *others)

    monkeypatch.setattr(fedtune.run.seeds, "federate", federate)
    out = tmp_path / "out"
    done = run("--strategy", "fedprox,fedavg", "--output_dir", out)
    assert done.status == 1
    assert "1 of 2 strategies failed: fedprox: no good updates" in done.err
    top = summary_of(out)
    assert top["status"] == "failed"
    ends = {one["strategy"]: one["status"] for one in top["strategies"]}
    assert ends == {"fedprox": "failed", "fedavg": "completed"}
    monkeypatch.undo()
    assert run("--strategy", "fedprox,fedavg", "--resume", "--output_dir", out).status == 0
    assert summary_of(out)["status"] == "completed"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--strategy", "fedavg,fedadm"), "unknown method 'fedadm'"),
        (("--strategy", "fedavg,fedavg"), "fedavg is given twice"),
        (("--strategy", "fedavg,fedadam", "--strategy_args", "mu=1"), "'mu' is no setting of any"),
        (("--strategy", "fedavg,krum", "--num_clients", "2"), "krum"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, flags: tuple[str, ...], words: str
):
    out = tmp_path / "out"
    done = run(*flags, "--output_dir", out)
    assert done.status == 2
    assert words in done.errors[-1]
    assert len(done.errors) == 1
    assert not out.exists()


def test_dry_run_tells_all_of_them(tmp_path: Path):
    out = tmp_path / "out"
    done = run("--strategy", "fedavg,scaffold", "--dry_run", "--output_dir", out)
    assert done.status == 0, done.err
    first, second = done.out.split("strategy scaffold")
    assert "strategy fedavg" in first
    assert "control variates" in second
    assert "control variates" not in first
    assert not out.exists()
