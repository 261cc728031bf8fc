"""SIGKILL to each process of a deployment in the middle of a round: what goes on, what is left.

One SuperLink with TLS and two sites serve all tests; a killed run must end like an undisturbed one.
"""

from __future__ import annotations

import time

import pytest
from torch import Tensor

from tests.deployment.parts import (
    Deployment,
    clientapp,
    serverapp,
    superlink,
    supernode,
    trainer,
)
from tests.deployment.runs import (
    BUSY_S,
    FLOWER_S,
    KEEPS,
    ROUNDS,
    STEPS,
    Run,
    Sites,
    killed_by_test,
    note,
    same,
    times,
)
from tests.processes.programs import left

pytestmark = pytest.mark.slow


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
    said = "the server ended in round 2 without a word (the server's process was killed by SIGKILL"
    assert said in run.submit.printed
    assert "Continue with --resume, or begin again" in run.submit.printed
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
