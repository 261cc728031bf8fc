"""A recount from outside: every figure of a run against what its models were seen to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recount.check_arms import check_arms
from tests.recount.check_federated import check_federated
from tests.recount.check_verdict import check_verdict
from tests.recount.recount import Recount
from tests.recount.runs import Run, run
from tests.recount.settings import FAST, SETTINGS


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in FAST else [pytest.mark.slow]


@pytest.mark.parametrize(
    "setting",
    [pytest.param(s, id=s.name, marks=marks(s.name)) for s in SETTINGS],
)
def test_every_figure_is_what_was_seen(setting, tmp_path: Path) -> None:
    done = run(setting, tmp_path / "run")
    found = recount(done)
    assert not found, "\n".join(["", *found])


def recount(done: Run) -> list[str]:
    """What the run says that is not so."""
    seeds = [Recount(done, seed) for seed in done.setting.seeds]
    for seed in seeds:
        check_federated(seed)
        check_arms(seed)
    return [line for seed in seeds for line in seed.found] + check_verdict(done, seeds)
