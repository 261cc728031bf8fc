"""A host with too much to do, where the server's app takes 45 s longer to import than Flower waits.

One SuperLink and one site serve all runs; four loops keep the CPUs busy meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.parts import Deployment, placed

LOOPS = 4
SLOW_S = 45.0  # Flower's patience is 30 s
LIMIT_S = 1500.0  # for a run; idle it takes one minute
PLAN = ["--num_rounds", 1, "--steps_per_round", 1, "--min_clients", 1, "--start_timeout_s", 1200]


class Loaded:
    """A deployment on a busy host."""

    def __init__(self, made: Deployment, starts: Path) -> None:
        self.made, self._starts = made, starts

    def started(self) -> list[str]:
        """Process ids of all ServerApps so far."""
        return self._starts.read_text().split() if self._starts.exists() else []


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    with placed("slow-", tls=False) as made:
        starts = made.directory / "starts"
        made.env |= {
            "PYTHONPATH": str(Path(__file__).with_name("slow_start")),
            "FEDTUNE_TEST_STARTS": str(starts),
            "FEDTUNE_TEST_SLOW_S": str(SLOW_S),
        }
        loops: list[subprocess.Popen[bytes]] = []
        try:
            made.up()
            made.join("a", "--step_s", 0).sees("waiting for a run")
            spin = [sys.executable, "-I", "-S", "-c", "while True: pass"]
            loops += [subprocess.Popen(spin) for _ in range(LOOPS)]
            yield Loaded(made, starts)
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
            remaining = made.close()
        assert remaining == []


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=[pytest.mark.slow, *[pytest.mark.nightly] * (number > 1)])
        for number in range(1, 11)
    ],
)
def test_a_run_starts_once_and_ends(loaded: Loaded, number: int) -> None:
    before = loaded.started()
    submit = loaded.made.submit(f"run-{number}", *PLAN)
    assert submit.wait(LIMIT_S) == 0, submit.printed
    assert len(loaded.started()) == len(before) + 1
