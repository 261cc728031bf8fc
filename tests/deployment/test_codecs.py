"""`--codec` over real processes: what travels, what a kill costs, and what the sites end with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.deployment.parts import Deployment, serverapp, supernode, trainer
from tests.deployment.runs import (
    BUSY_S,
    FLOWER_S,
    KEEPS,
    ROUNDS,
    STEPS,
    Run,
    Sites,
    killed_by_test,
    same,
    times,
)

pytestmark = pytest.mark.slow

NF4 = ("--codec", "nf4")
BITS_4 = 0.516  # bytes a value
REST = 1024  # what may travel beside the values of a message: its record, names and shapes


@pytest.fixture(scope="module")
def undisturbed(made: Deployment, sites: Sites) -> Run:
    sites.running(KEEPS, KEEPS)
    run = Run(made, "undisturbed", *NF4)
    run.finish()
    return run


def values(run: Run) -> int:
    return sum(tensor.numel() for tensor in run.adapter().values())


def down(run: Run, site: str) -> list[int]:
    """Bytes to a site, round by round."""
    return [record["clients"][site]["bytes_down"] for record in run.rounds]


def wholes(run: Run, site: str, usual: Run) -> list[int]:
    """How many whole messages, of 16 bits a value, more than usual went to a site, by round."""
    counts = []
    for sent, expected in zip(down(run, site), down(usual, site), strict=True):
        count = round((sent - expected) / (2 * values(usual)))
        # Not even a difference more, nor less, but in place of a whole message; a site that failed
        # is also set up again.
        more, difference = sent - expected - count * 2 * values(usual), BITS_4 * values(usual)
        assert -count * difference - REST < more < 0.9 * difference
        counts.append(count)
    return counts


def losses(run: Run) -> list[float]:
    return [record["eval_loss"] for record in run.rounds]


def ends_as_low(run: Run, undisturbed: Run) -> None:
    """A whole message of 16 bits moves a weight by 0.2 %."""
    first, *_, last = losses(undisturbed)
    assert abs(losses(run)[-1] - last) < 0.02 * (first - last)


def folders(made: Deployment, site: str) -> set[Path]:
    """Where a site keeps what coded transport needs."""
    return set((made.directory / site / "output").glob("_fedtune_transport-*"))


def ends_with_the_servers_adapter(made: Deployment, run: Run) -> None:
    """Exactly: the last message is whole and plain."""
    weights = "adapter_model.safetensors"
    server = load_file(run.directory / "adapter" / weights)
    for site in "ab":
        made.until(lambda s=site: (made.directory / s / "output" / weights).exists())
        same(load_file(made.directory / site / "output" / weights), server)


def test_an_eighth_travels_both_ways_from_the_first_round_on(
    made: Deployment, undisturbed: Run
) -> None:
    ends_with_the_servers_adapter(made, undisturbed)
    assert losses(undisturbed) == sorted(losses(undisturbed), reverse=True)
    coded = BITS_4 * values(undisturbed)
    for record in undisturbed.rounds:
        for site in "ab":
            sent = record["clients"][site]
            assert coded < sent["bytes_up"] < coded + REST
            assert 4 * values(undisturbed) < sent["bytes_up_raw"]
            # The new adapter to score it; to train, that nothing has changed since.
            assert coded < sent["bytes_down"] < coded + 2 * REST
    for site in "ab":
        made.until(lambda s=site: not folders(made, s))


def test_what_a_killed_process_of_a_site_costs(
    made: Deployment, sites: Sites, undisturbed: Run
) -> None:
    """Nothing, as all is on disk; without what is there, one whole message."""
    a, b = sites.running(KEEPS, KEEPS).values()
    run = Run(made, "at-sites", *NF4)

    run.reaches_round(2, "a")
    killed_by_test(trainer(a), run, 2)
    run.await_round(2)

    run.reaches_round(3, "b")
    killed_by_test(trainer(b), run, 3)
    (lost,) = folders(made, "b")
    assert list(lost.glob("version-*"))
    assert (lost / "residual" / "round-00002.safetensors").is_file()
    shutil.rmtree(lost)
    run.await_round(3)

    run.reaches_round(4, "a")
    killed_by_test(supernode(a), run, 4)
    run.finish()
    assert [record["attempt"] for record in run.rounds] == [1, 1, 1, 2]
    assert times(run.steps("a"))[2 * STEPS :] == [1] * (2 * STEPS)
    assert times(run.steps("b"))[3 * STEPS :] == [1] * STEPS
    assert wholes(run, "a", undisturbed) == [0, 0, 0, 0]
    assert wholes(run, "b", undisturbed) == [0, 0, 1, 0]
    assert losses(run)[:2] == losses(undisturbed)[:2]
    ends_as_low(run, undisturbed)
    assert not any(record["refused"] for record in run.rounds)
    ends_with_the_servers_adapter(made, run)


def test_a_resumed_server_knows_nobody(made: Deployment, sites: Sites, undisturbed: Run) -> None:
    """Its whole message finds the round trained from a difference; the next is whole as well."""
    sites.running(KEEPS, KEEPS)
    run, up = Run(made, "at-server", *NF4), made.programs[1]
    run.reaches_round(2, "a")
    killed_by_test(serverapp(up), run, 2)
    assert run.submit.wait(FLOWER_S + 2 * BUSY_S) == 1
    run.resume()
    run.finish()
    for site in "ab":
        assert wholes(run, site, undisturbed) == [0, 2, 0, 0]
        assert times(run.steps(site)) == [1] * (ROUNDS * STEPS)
    assert losses(run)[:1] == losses(undisturbed)[:1]
    ends_as_low(run, undisturbed)
    assert not any(record["refused"] for record in run.rounds)
    ends_with_the_servers_adapter(made, run)
