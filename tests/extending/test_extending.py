"""A package of its own brings a rule, a server optimizer and a workflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = '''
from dataclasses import dataclass

from fedtune.server.rounds.central import CentralRounds
from fedtune.strategies import Rule, ServerOptimizer
from fedtune.strategies.settings import SHARE, setting


@dataclass(frozen=True)
class BySteps(Rule):
    """A client counts as many times as it has taken steps."""

    def weigh(self, stats):
        return float(stats.num_steps)


@dataclass(frozen=True)
class PartOfTheWay(ServerOptimizer):
    """A fixed share of the way.

    Attributes:
        share: of the way to the aggregate.
    """

    share: float = setting(0.5, SHARE)

    def move(self, delta, memory):
        return self.share * delta, {}


class InTurn(CentralRounds):
    """One client after the other."""

    def sample(self, number, attempt, members):
        names = sorted(member.name for member in members)
        return [names[(number - 1) % len(names)]]
'''
ENTRY_POINTS = """
[fedtune.methods]
by_steps = their_package:BySteps
part_of_the_way = their_package:PartOfTheWay
[fedtune.workflows]
in_turn = their_package:InTurn
"""
RUN = (
    "--config recipes/demo.yaml --compare none --partition iid --num_clients 2 --max_rows 60 "
    "--num_rounds 2 --steps_per_round 2"
)


def install(directory: Path, entry_points: str = ENTRY_POINTS) -> dict[str, str]:
    """Put the package there; returns an environment that has it."""
    (directory / "their_package.py").write_text(PACKAGE)
    about = directory / "their_package-1.2.dist-info"
    about.mkdir()
    about.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: their_package\nVersion: 1.2\n"
    )
    about.joinpath("entry_points.txt").write_text(entry_points)
    return {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{REPOSITORY}"}


def call(env: Mapping[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )


def recipe(env: Mapping[str, str], output: Path, words: str) -> subprocess.CompletedProcess[str]:
    return call(env, "recipes/lora_sft.py", *f"{RUN} {words}".split(), "--output_dir", output)


def rounds(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]


def test_they_are_found_and_run(tmp_path: Path) -> None:
    env = install(tmp_path)
    words = "--strategy by_steps+part_of_the_way --strategy_args share=0.25 --workflow in_turn"
    ended = recipe(env, tmp_path / "run", words)
    assert ended.returncode == 0, ended.stderr
    asked = [[reply["client"] for reply in one["replies"]] for one in rounds(tmp_path / "run")]
    assert asked == [["client-0"], ["client-1"]]
    for one in rounds(tmp_path / "run"):
        moved = one["replies"][0]["norm"]
        assert one["update_norm"] == pytest.approx(0.25 * moved, rel=1e-5)  # rounded to fp32


def test_they_are_listed_with_their_package(tmp_path: Path) -> None:
    listed = call(install(tmp_path), "-m", "fedtune.cli", "methods").stdout
    rows = [" ".join(line.split()) for line in listed.splitlines()]
    server = "part_of_the_way server optimizer - share their_package 1.2 A fixed share of the way."
    assert server in rows
    assert "in_turn their_package 1.2 One client after the other." in rows
    assert any(row.startswith("fedavg rule ") for row in rows)


@pytest.mark.parametrize(
    ("entry_points", "words", "said"),
    [
        (ENTRY_POINTS, "--strategy by_stepz", "unknown method 'by_stepz'. Did you mean by_steps?"),
        (ENTRY_POINTS, "--workflow inturn", "unknown workflow 'inturn'. Did you mean in_turn?"),
        (
            ENTRY_POINTS,
            "--strategy part_of_the_way --strategy_args share=2",
            "share: expected a number >= 0 and < 1, received 2",
        ),
        (
            ENTRY_POINTS.replace("BySteps", "Gone"),
            "--strategy by_steps",
            "by_steps: their_package cannot be loaded from their_package:Gone: AttributeError",
        ),
        (
            ENTRY_POINTS.replace("by_steps", "fedprox"),
            "--strategy fedprocks",
            "two packages bring 'fedprox' (fedtune.methods): fedtune and their_package",
        ),
    ],
    ids=["method", "workflow", "range", "broken", "taken"],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, entry_points: str, words: str, said: str
) -> None:
    ended = recipe(install(tmp_path, entry_points), tmp_path / "run", f"{words} --dry_run")
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_on_real_nodes(tmp_path: Path) -> None:
    words = "--strategy by_steps+part_of_the_way --workflow in_turn --engine flower"
    env = install(tmp_path)
    ended = recipe(env, tmp_path / "run", words)
    assert ended.returncode == 0, ended.stderr
    inline = recipe(env, tmp_path / "inline", words.replace("flower", "inline"))
    assert inline.returncode == 0, inline.stderr
    losses = [[one["eval_loss"] for one in rounds(tmp_path / name)] for name in ("run", "inline")]
    assert losses[0] == losses[1]
