"""A run ends without a goodbye while a site's script loads: the site finds out, and is free."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.deployment.parts import Deployment, Program, kill, placed, serverapp

pytestmark = pytest.mark.slow

LOADS = "import time; print('loading', flush=True); time.sleep(3600)"
PLAN = ["--num_rounds", 1, "--steps_per_round", 1, "--min_clients", 1, "--join_timeout_s", 600]
GONE = "over before its first round here (it has ended at the server); the script was ended"


@pytest.fixture(scope="module")
def made() -> Iterator[Deployment]:
    with placed("let-go-", tls=False) as deployment:
        try:
            deployment.up()
            yield deployment
        finally:
            remaining = deployment.close()
        assert remaining == []


@pytest.fixture(scope="module")
def site(made: Deployment) -> Program:
    words = ["--superlink", made.address, "--name", "a", "--output_dir", made.directory / "a"]
    joined = made.start("join", "join", *words, "--", sys.executable, "-c", LOADS)
    joined.sees("waiting for a run")
    return joined


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_site_lets_go_of_a_run_whose_server_is_gone(
    made: Deployment, site: Program, how: str
) -> None:
    begun, gone = (site.printed.count(words) for words in (" begins: ", GONE))
    submit = made.submit(how, *PLAN)
    made.until(lambda: site.printed.count(" begins: ") == begun + 1)
    submit.sees("sites: a starting")
    if how == "killed":
        kill(serverapp(made.programs[0]))
    else:
        stop = made.start("stop", "stop", "--superlink", made.address, "--now")
        assert stop.wait(180) == 0, stop.printed
    assert submit.wait(240) == 1, submit.printed
    made.until(lambda: site.printed.count(GONE) == gone + 1)
    assert site.printed.rstrip().endswith("a: waiting for the next run")
