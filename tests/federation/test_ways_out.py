"""What real runs leave when they are killed, interrupted or fail: in rounds, in arms, in seeds."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.compare.settle import settle
from fedtune.errors import FedtuneError
from fedtune.report import load_summary
from fedtune.report.findings import headline
from tests.federation.killing import Ended, Killer
from tests.federation.small import small_rows

ROUNDS = 4
ARM = "run/arms/centralized/work"  # there while that arm trains


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    helper = Killer()
    yield helper
    helper.close()


class Lab:
    """Runs of one recipe in `directory`."""

    def __init__(self, killer: Killer, directory: Path) -> None:
        self.killer, self.directory = killer, directory
        self.run_dir = directory / "run"
        ids = small_rows(24)["input_ids"]
        rows = "".join(json.dumps({"input_ids": row}) + "\n" for row in ids)
        (directory / "rows.jsonl").write_text(rows)

    def run(self, **given: Any) -> Ended:
        return self.killer.run("recipe", self.directory, **given)

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return found

    @property
    def log(self) -> str:
        return self.directory.with_name(f"{self.directory.name}.log").read_text()

    def left(self, *also: str) -> None:
        """What every way out leaves."""
        for name in ("summary.json", "report.html", "loss.png", "adapter", "rounds.jsonl", *also):
            assert (self.run_dir / name).exists(), name


@pytest.fixture
def lab(killer: Killer, tmp_path: Path) -> Lab:
    return Lab(killer, tmp_path)


def test_killed_in_a_round_then_plotted_then_resumed(lab: Lab) -> None:
    assert lab.run(kill_when="run/checkpoints/round-00002").status == -signal.SIGKILL
    assert not (lab.run_dir / "summary.json").exists()
    assert main(["plot", str(lab.run_dir)]) == 0
    lab.left()
    done = len((lab.run_dir / "rounds.jsonl").read_text().splitlines())
    assert lab.summary["status"] == "killed"
    assert lab.summary["where"] == f"in round {done + 1} of {ROUNDS}"
    assert len(lab.summary["arms"]["federated"]["eval_loss"]) == done + 1
    assert f"Killed in round {done + 1} of {ROUNDS}." in (lab.run_dir / "report.html").read_text()
    assert lab.run().status == 0, lab.log
    assert lab.summary["status"] == "completed"
    assert "where" not in lab.summary
    assert len(lab.summary["arms"]["federated"]["eval_loss"]) == ROUNDS + 1


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_interrupted_in_a_round(lab: Lab, number: signal.Signals, status: int) -> None:
    ended = lab.run(kill_when="run/checkpoints/round-00001", kill_by=number)
    assert ended.status == status, lab.log
    lab.left()
    assert lab.summary["status"] == "interrupted"
    assert lab.summary["reason"] == f"interrupted by {number.name}"
    assert headline(load_summary(lab.run_dir)).startswith("Interrupted in round ")


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGKILL, -9, "killed"),
        (signal.SIGTERM, 143, "interrupted"),
    ],
)
def test_ended_in_an_arm(lab: Lab, number: signal.Signals, status: int, told: str) -> None:
    """The federated result is whole, and a resumed run does the rest."""
    arms = {"compare": "centralized,local"}
    assert lab.run(kill_when=ARM, kill_by=number, **arms).status == status, lab.log
    settle(lab.run_dir)
    lab.left()
    assert (lab.summary["status"], lab.summary["where"]) == (told, "in the arm centralized")
    assert [*lab.summary["arms"]] == ["federated"]
    assert len(lab.summary["arms"]["federated"]["eval_loss"]) == ROUNDS + 1
    assert lab.run(**arms).status == 0, lab.log
    assert [*lab.summary["arms"]] == ["federated", "centralized", "local"]


def test_killed_before_anything_was_scored(lab: Lab) -> None:
    assert lab.run(kill_when="run/run.json").status == -signal.SIGKILL
    settle(lab.run_dir)
    summary = load_summary(lab.run_dir)
    assert (summary.status, summary.rounds) == ("killed", 0)
    page = (lab.run_dir / "report.html").read_text()
    assert "Killed before round 1." in page
    assert "No round was finished: there is no curve." in page
    assert lab.run().status == 0, lab.log


def test_a_live_run_is_not_killed_and_has_one_writer(lab: Lab) -> None:
    """Frozen in the middle, it still holds its directory; when it is gone nobody does."""
    import os
    import subprocess
    import sys
    import time

    code = (
        "import sys, time; from pathlib import Path; from fedtune.lock import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    assert lab.run(kill_when="run/checkpoints/round-00001").status == -signal.SIGKILL
    words = [sys.executable, "-c", code, lab.run_dir]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FedtuneError, match=f"still going on in process {other.pid}"):
            settle(lab.run_dir)
        assert main(["plot", str(lab.run_dir)]) == 2
        assert lab.run().status == 1
        assert f"still going on in process {other.pid}" in lab.log
        assert not (lab.run_dir / "summary.json").exists()
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    time.sleep(0)
    assert lab.run().status == 0, lab.log


@pytest.mark.slow
def test_killed_before_each_durable_operation(lab: Lab, killer: Killer, tmp_path: Path) -> None:
    """Whatever was on disk, the directory can be told, and the run can be resumed."""
    whole = lab.run(num_rounds=2)
    assert whole.status == 0, lab.log
    for point in range(1, whole.operations, 23):
        (tmp_path / f"at-{point}").mkdir()
        other = Lab(killer, tmp_path / f"at-{point}")
        assert other.run(kill_at=point, num_rounds=2).status == -signal.SIGKILL
        if (other.run_dir / "run.json").is_file() and not (other.run_dir / "summary.json").exists():
            settle(other.run_dir)
            assert load_summary(other.run_dir).status == "killed"
        assert other.run(num_rounds=2).status == 0, other.log
        assert (
            other.summary["arms"]["federated"]["eval_loss"]
            == (lab.summary["arms"]["federated"]["eval_loss"])
        )
