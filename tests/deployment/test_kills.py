"""SIGKILL to each process of a deployment in the middle of a round: what goes on, what is left.

One SuperLink with TLS and two sites serve all tests; a killed run must end like an undisturbed one.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedtune.adapters import load_exported
from fedtune.assets import MODEL_DIR
from fedtune.server.checkpoint import load_latest
from tests.deploy.programs import left
from tests.deployment.parts import (
    Deployment,
    Program,
    Step,
    clientapp,
    kill,
    serverapp,
    superlink,
    supernode,
    trainer,
)

pytestmark = pytest.mark.slow

ROUNDS, STEPS = 4, 4
PLAN = ["--num_rounds", ROUNDS, "--steps_per_round", STEPS, "--min_clients", 2]
KEEPS = ["--save_steps", STEPS]  # a checkpoint of each round's end
STEP_S = 0.5  # a round is long enough to find a process in it and kill it
FLOWER_S = 60  # Flower takes two missed signs of life, 30 s apart, for an end
BUSY_S = 30  # what a machine with too much to do may add


class Run:
    """A run over the sites of a deployment, and what they trained in it."""

    def __init__(self, deployment: Deployment, output: str, *flags: Any) -> None:
        self.deployment, self.output, self.flags = deployment, output, flags
        self.directory = deployment.directory / output
        self._before = {site: len(deployment.steps(site)) for site in "ab"}
        self.submit = deployment.submit(output, *PLAN, *flags)

    def resume(self) -> None:
        self.submit = self.deployment.submit(self.output, *PLAN, *self.flags, "--resume")

    def steps(self, site: str) -> list[Step]:
        return self.deployment.steps(site)[self._before[site] :]

    def reaches_round(self, number: int, site: str) -> None:
        """Wait until the site is past the first step of a round."""
        step = (number - 1) * STEPS + 1
        self.deployment.until(lambda: any(row.step >= step for row in self.steps(site)))

    def is_in_round(self, number: int) -> bool:
        return len(self.rounds) == number - 1

    def await_round(self, number: int) -> None:
        """Wait until the round is over."""
        self.deployment.until(lambda: len(self.rounds) >= number)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        file = self.directory / "rounds.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def finish(self) -> dict[str, Tensor]:
        """Wait for the end; returns the last adapter."""
        assert self.submit.wait() == 0, self.submit.printed
        assert [record["round"] for record in self.rounds] == list(range(1, ROUNDS + 1))
        return self.adapter()

    def adapter(self) -> dict[str, Tensor]:
        """What anyone would load from disk, which is that of the last round."""
        params, _, _ = load_exported(self.directory / "adapter")
        state = load_latest(self.directory / "checkpoints")
        assert state is not None
        assert state.round == self.rounds[-1]["round"]
        same(params, state.params)
        base = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
        PeftModel.from_pretrained(base, str(self.directory / "adapter"))
        return params


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def times(steps: list[Step]) -> list[int]:
    """How often each step of the run was trained."""
    return [sum(row.step == number for row in steps) for number in range(ROUNDS * STEPS)]


def note(what: str, seconds: float) -> None:
    """For whoever wants to know (pytest -rP)."""
    print(f"{what}: {seconds:.1f} s")


def killed_by_test(process: psutil.Process, run: Run, number: int) -> float:
    """SIGKILL it in the middle of a round; returns when."""
    when = kill(process)
    assert run.is_in_round(number), "the machine is too busy: the round was over before"
    return when


@pytest.fixture(scope="module")
def made() -> Iterator[Deployment]:
    with (
        tempfile.TemporaryDirectory(prefix="kills-") as directory,
        tempfile.TemporaryDirectory(prefix="ft-") as temporary,
    ):
        deployment = Deployment(Path(directory), Path(temporary), tls=True)
        try:
            deployment.up()
            yield deployment
        finally:
            remaining = deployment.close()
        assert remaining == []
        assert list(Path(temporary).iterdir()) == []


class Sites:
    """Two sites, whose scripts may change between tests."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._flags: list[list[Any]] = []
        self._joined: dict[str, Program] = {}

    def running(self, *flags: list[Any]) -> dict[str, Program]:
        """Sites a and b, whose scripts have these flags."""
        if self._flags != [*flags]:
            self.end()
            self._flags = [*flags]
            for name, words in zip("ab", flags, strict=True):
                self._joined[name] = self._deployment.join(name, "--step_s", STEP_S, *words)
        return self._joined

    def end(self) -> None:
        """As by SIGTERM of an operator."""
        assert [site.end() for site in self._joined.values()] == [143] * len(self._joined)
        self._joined = {}


@pytest.fixture(scope="module")
def sites(made: Deployment) -> Iterator[Sites]:
    joined = Sites(made)
    yield joined
    joined.end()


@pytest.fixture(scope="module")
def undisturbed(made: Deployment, sites: Sites) -> dict[str, Tensor]:
    sites.running(KEEPS, KEEPS)
    run = Run(made, "undisturbed")
    adapter = run.finish()
    assert times(run.steps("a")) == times(run.steps("b")) == [1] * (ROUNDS * STEPS)
    return adapter


def test_a_process_of_a_site_is_killed_and_the_run_ends_as_if_it_were_not(
    made: Deployment, sites: Sites, undisturbed: dict[str, Tensor]
) -> None:
    a, b = sites.running(KEEPS, KEEPS).values()
    run = Run(made, "at-sites")

    run.reaches_round(2, "a")
    when = killed_by_test(clientapp(a), run, 2)
    run.await_round(2)
    note("clientapp: the round ends", time.monotonic() - when)

    run.reaches_round(3, "a")
    first = trainer(a)
    when = killed_by_test(first, run, 3)
    a.sees("trainer restarted (1 of 3). trainer: killed by SIGKILL")
    made.until(lambda: run.steps("a")[-1].pid != first.pid)
    note("trainer: trains again", time.monotonic() - when)
    run.await_round(3)
    note("trainer: the round ends", time.monotonic() - when)

    run.reaches_round(4, "b")
    node = supernode(b)
    (executor,) = node.children()
    when = killed_by_test(node, run, 4)
    b.sees("node restarted. node: killed by SIGKILL")
    note("supernode: the site says so", time.monotonic() - when)
    assert left([executor]) == []
    run.await_round(4)
    seconds = time.monotonic() - when
    note("supernode: the round ends", seconds)
    assert seconds < FLOWER_S  # the next node has told the server

    same(run.finish(), undisturbed)
    two = 2 * STEPS
    assert times(run.steps("a")) == [1] * two + [2, 2] + [1] * (ROUNDS * STEPS - two - 2)
    assert times(run.steps("b")) == [1] * (ROUNDS * STEPS)
    repeated = [row for row in run.steps("a") if row.step in (two, two + 1)]
    assert [row.digest for row in repeated[:2]] == [row.digest for row in repeated[2:]]
    assert [record["attempt"] for record in run.rounds] == [1, 1, 1, 2]
    log = (made.directory / "a" / "logs" / "node.log").read_text()
    assert "killed by SIGKILL; another one takes over" in log
    assert "round 4: attempt 1 failed: 1 of 2 needed updates (b: Error: Node" in run.submit.printed


def test_the_server_is_killed_and_a_resumed_run_ends_as_if_it_were_not(
    made: Deployment, sites: Sites, undisturbed: dict[str, Tensor]
) -> None:
    sites.running(KEEPS, KEEPS)
    run, up = Run(made, "at-server"), made.programs[1]

    run.reaches_round(2, "a")
    when = killed_by_test(serverapp(up), run, 2)
    assert run.submit.wait(FLOWER_S + 2 * BUSY_S) == 1
    note("serverapp: submit ends", time.monotonic() - when)
    assert "the server ended in round 2 without a word (finished:failed)" in run.submit.printed
    assert "Continue with --resume." in run.submit.printed
    run.adapter()

    run.resume()
    run.reaches_round(3, "a")
    orphan = serverapp(up)
    when = killed_by_test(superlink(up), run, 3)
    assert up.wait(BUSY_S) == 2
    note("superlink: up ends", time.monotonic() - when)
    assert left([orphan]) == []
    assert "error: superlink: killed by SIGKILL" in up.printed
    assert run.submit.wait(2 * BUSY_S) == 1
    note("superlink: submit ends", time.monotonic() - when)
    assert "nothing listens there. Start it with fedtune up" in run.submit.printed
    run.adapter()
    assert len(run.rounds) == 2

    began = time.monotonic()
    made.programs[1] = made.up()
    run.resume()
    run.await_round(3)
    note("superlink: up and submit --resume to the end of the round", time.monotonic() - began)
    same(run.finish(), undisturbed)
    assert times(run.steps("a")) == times(run.steps("b")) == [1] * (ROUNDS * STEPS)


def test_a_site_without_checkpoints_goes_on_and_one_that_diverges_is_refused(
    made: Deployment, sites: Sites
) -> None:
    first_bad = 2 * STEPS + 1  # in round 3
    joined = sites.running([], ["--nan_from", first_bad])
    run = Run(made, "without", "--min_replies", 1)
    run.reaches_round(2, "a")
    process = trainer(joined["a"])
    when = killed_by_test(process, run, 2)
    made.until(lambda: run.steps("a")[-1].pid != process.pid)
    note("trainer without checkpoints: trains again", time.monotonic() - when)
    adapter = run.finish()
    assert all(bool(value.isfinite().all()) for value in adapter.values())
    assert times(run.steps("a")) == [1] * STEPS + [2, 2] + [1] * (ROUNDS * STEPS - STEPS - 2)
    assert times(run.steps("b")) == [1] * (ROUNDS * STEPS)
    rates = {(row.step, row.rate) for row in run.steps("a")}
    assert len(rates) == ROUNDS * STEPS  # a repeated step has the rate that it had
    took = [[reply["client"] for reply in record["replies"]] for record in run.rounds]
    assert [sorted(names) for names in took] == [["a", "b"]] * 2 + [["a"]] * 2
    assert [row["client"] for row in run.rounds[2]["refused"]] == ["b"]
    assert "round 3: refused b (" in run.submit.printed
    joined["b"].sees(f"over after round {ROUNDS} (done)")  # refused in the last round, yet told
