"""The site's directory and its limits."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ConfigError, SiteError
from fedtune.relay.folder import Over, Progress, RunFolder, SitePlan
from fedtune.relay.limits import Limits, check_steps
from fedtune.relay.site import SiteFolder


def plan(run: str = "r") -> SitePlan:
    return SitePlan(run, "site", num_rounds=2, steps=5, epochs=0.0, carry=True, seed=0)


def test_what_is_written_is_found(short_path: Path) -> None:
    SiteFolder.create(short_path, "site-a", Limits(3, 100, 9.5))
    site = SiteFolder.find({"fedtune-site": str(short_path)})
    assert site.name == "site-a"
    assert site.limits == Limits(3, 100, 9.5)
    assert site.planned() == []


def test_a_directory_too_deep_for_any_run(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    with pytest.raises(ConfigError, match="TMPDIR"):
        SiteFolder.create(deep, "site-a", Limits())


def test_runs_are_listed_oldest_first(short_path: Path) -> None:
    site = SiteFolder.create(short_path, "site-a", Limits())
    for name in ("9", "10", "8"):
        site.begin(plan(name), "1").write_exit_status(0)
    assert [folder.path.name for folder in site.planned()] == ["9", "10", "8"]


def test_a_folder_without_a_plan_is_no_run(short_path: Path) -> None:
    site = SiteFolder.create(short_path, "site-a", Limits())
    (site.runs / "5").mkdir()
    assert site.planned() == []
    with pytest.raises(SiteError, match="has not begun"):
        site.run("5")
    assert site.begin(plan("5"), "1").plan == plan(
        "5"
    )  # a relay was killed before it wrote the plan


@pytest.mark.parametrize("run", ["", "../x", "a/b", ".hidden", "r" * 25])
def test_a_run_is_a_plain_name(short_path: Path, run: str) -> None:
    site = SiteFolder.create(short_path, "site-a", Limits())
    with pytest.raises(SiteError, match="run: expected an id of up to 24 letters"):
        site.begin(plan(run), "1")
    assert list(site.runs.iterdir()) == []


@pytest.mark.parametrize(
    ("rounds", "steps", "limit", "good"),
    [(3, 5, 15, True), (3, 5, 14, False), (3, 5, 0, True), (1, 1, 1, True), (1, 2, 1, False)],
)
def test_steps(rounds: int, steps: int, limit: int, good: bool) -> None:
    if good:
        check_steps(rounds, steps, limit)
    else:
        with pytest.raises(SiteError, match=f"at most {limit} in a run, received {rounds} rounds"):
            check_steps(rounds, steps, limit)


def test_what_is_left_of_runs_is_removed_when_they_are_over(short_path: Path) -> None:
    site = SiteFolder.create(short_path, "a", Limits())
    plan = SitePlan("1", "a", 3, 5, 0.0, True, 1, idle_timeout_s=60.0)

    def begun(name: str) -> RunFolder:
        folder = RunFolder.create(site.runs / name)
        folder.write_plan(replace(plan, run=name))
        folder.write_flower_run("9")
        (folder.replies / "round").write_bytes(bytes(10**6))
        (folder.replies / "finish").write_bytes(bytes(100))
        (folder.path / "transport").mkdir()
        (folder.path / "transport" / "version").write_bytes(bytes(10**6))
        folder.lock.touch()
        return folder

    def size(folder: RunFolder) -> int:
        return sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())

    names = ("goes on", "finished", "lingers", "cut off", "crashed", "crashed long ago")
    runs = {name: begun(name) for name in names}
    for name in ("finished", "lingers"):
        runs[name].write_progress(Progress(3, finished=True))
    for name in ("finished", "cut off", "crashed", "crashed long ago"):
        runs[name].write_exit_status(1, "why")
    runs["cut off"].write_over(Over("9", "no more", at_once=True))
    before = time.time() - 61
    os.utime(runs["crashed long ago"].path / "ended.json", (before, before))
    for _ in range(2):
        site.tidy()
        assert {name: round(size(folder) / 10**6) for name, folder in runs.items()} == {
            "goes on": 2,
            "finished": 0,
            "lingers": 1,  # what the script may use itself
            "cut off": 0,
            "crashed": 2,  # its last reply may still be asked for
            "crashed long ago": 0,
        }
    assert (runs["finished"].replies / "finish").exists()
    assert runs["finished"].exit_status == 1
    assert len(runs["finished"].authkey) == 32
