"""One finished run per recipe, shared by all tests (and by all workers of pytest-xdist)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

from tests.recipes.runs import RECIPES, Done, run_cli, tiny


class Finished(NamedTuple):
    """A recipe, its finished `--compare all` run, and what it printed."""

    script: Path
    directory: Path
    done: Done
    summary: dict[str, Any]


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def finished(request, tmp_path_factory) -> Finished:
    script = request.param
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a worker of pytest-xdist
        shared = shared.parent
    home = shared / f"recipe-{script.stem}"
    home.mkdir(exist_ok=True)
    with FileLock(home / "lock"):
        printed = home / "printed.json"
        if not printed.is_file():
            done = run_cli(
                script, *tiny(script), "--compare", "all", "--output_dir", "out", cwd=home
            )
            printed.write_text(json.dumps(done))
    done = Done(*json.loads(printed.read_text()))
    assert done.status == 0, done.err
    directory = home / "out"
    return Finished(script, directory, done, json.loads((directory / "summary.json").read_text()))
