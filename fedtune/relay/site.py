"""The private directory of a site: `fedtune join` makes it, the relay finds it, one folder a run.

site.json       name and limits
runs/<run>/     a `RunFolder`, named by the id that the server gave the run
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from fedtune.errors import SiteError
from fedtune.files import read_json, write_json
from fedtune.relay.folder import RunFolder, SitePlan
from fedtune.relay.limits import Limits, check_plan

__all__ = ["ENVIRONMENT", "NODE_CONFIG", "SiteFolder"]

ENVIRONMENT = "FEDTUNE_SITE"  # names the directory to a relay that our SuperNode starts
NODE_CONFIG = "fedtune-site"  # the same for a SuperNode that was started by hand
LONGEST_RUN = 24  # characters
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class SiteFolder:
    """Paths and small files of the directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, name: str, limits: Limits) -> SiteFolder:
        """Fill an empty directory; raises ConfigError when its sockets' paths would be too long."""
        site = cls(path)
        site.runs.mkdir(mode=0o700)
        RunFolder(site.runs / ("r" * LONGEST_RUN)).check_length()
        write_json(path / "site.json", {"name": name, **asdict(limits)})
        return site

    @classmethod
    def find(cls, node_config: Mapping[str, object]) -> SiteFolder:
        """The directory that the environment or the node's config names. Raises SiteError."""
        named = os.environ.get(ENVIRONMENT) or node_config.get(NODE_CONFIG)
        if not named:
            raise SiteError(
                f"site: expected {ENVIRONMENT} or node config {NODE_CONFIG}, received neither. "
                "Start the node with fedtune join."
            )
        site = cls(Path(str(named)))
        if not (site.path / "site.json").is_file():
            raise SiteError(
                f"site: expected a directory made by fedtune join, received {site.path}. "
                "Start the node with fedtune join."
            )
        return site

    @property
    def runs(self) -> Path:
        """Directory of the runs."""
        return self.path / "runs"

    @property
    def name(self) -> str:
        """Name of the site."""
        return str(read_json(self.path / "site.json")["name"])

    @property
    def limits(self) -> Limits:
        """What a server may ask for."""
        plain = read_json(self.path / "site.json")
        plain.pop("name")
        return Limits(**plain)

    def planned(self) -> list[RunFolder]:
        """Runs that have a plan, oldest first."""
        files = [path for path in self.runs.glob("*/plan.json") if path.is_file()]
        return [
            RunFolder(path.parent) for path in sorted(files, key=lambda p: p.stat().st_mtime_ns)
        ]

    def run(self, run: str) -> RunFolder:
        """The folder of a run that has begun here. Raises SiteError."""
        folder = self.known(run)
        if folder is None:
            raise SiteError(f"run {run}: has not begun at this site. Send query.plan first.")
        return folder

    def tidy(self) -> None:
        """Clean the folders of runs that are over, and of scripts that ended before their run.

        The replies of the latter are kept for as long as the trainer would have waited.
        """
        for folder in self.planned():
            ended_s, finished = folder.ended_s, folder.progress.finished
            if ended_s is None:
                if finished:  # the script goes on with something else
                    folder.drop_replies()
                continue
            plan = folder.plan
            is_over = finished or folder.over is not None
            if is_over or plan is None or ended_s > plan.idle_timeout_s:
                folder.clean()

    def known(self, run: str) -> RunFolder | None:
        """The folder of a run that has begun here, or None."""
        folder = self._folder(run)
        return None if folder.plan is None else folder

    def begin(self, plan: SitePlan, flower_run: str) -> RunFolder:
        """Accept `plan`, which starts the site's script, or find the run that it began before.

        A run that is continued after its server was lost comes with the same id and another of
        Flower's: a script that still waits goes on, one that has ended is started again.

        Raises:
            SiteError: the plan is beyond the limits, another run is going on, or the same run
                began with another plan.
        """
        limits = self.limits
        plan = replace(plan, max_steps=limits.max_steps)
        folder = self._folder(plan.run)
        known = folder.plan
        if known is not None and _continues(folder, flower_run):
            if known != replace(plan, idle_timeout_s=known.idle_timeout_s):
                raise SiteError(
                    f"run {plan.run}: began at this site with another plan, expected {known}, "
                    f"received {plan}. Submit a new run."
                )
            if folder.exit_status is not None:
                raise SiteError(f"run {plan.run}: {folder.end}. Look at the site's trainer.log.")
            folder.write_flower_run(flower_run)
            return folder
        check_plan(plan, limits)
        for other in self.planned():
            if other.path != folder.path and not other.is_over:
                if (over := other.over) is not None:
                    other.write_over(replace(over, at_once=True))
                    raise SiteError(
                        f"run {plan.run}: this site ends the script of run {other.path.name}, "
                        "which is over. It is asked again."
                    )
                raise SiteError(
                    f"run {plan.run}: this site is busy with run {other.path.name} (round "
                    f"{other.progress.round}). Wait until that has ended, stop it, or start "
                    "fedtune join at the site again."
                )
        if known is not None:
            if folder.exit_status is None:
                raise SiteError(
                    f"run {plan.run}: the site's script is still ending. It is asked again."
                )
            shutil.rmtree(folder.path)
        folder = RunFolder.create(folder.path)
        folder.write_flower_run(flower_run)
        folder.write_plan(plan)
        return folder

    def _folder(self, run: str) -> RunFolder:
        if len(run) > LONGEST_RUN or not RUN.fullmatch(run):
            raise SiteError(
                f"run: expected an id of up to {LONGEST_RUN} letters, digits, '_', '-' and '.', "
                f"received {run!r}. Use the same fedtune on both sides."
            )
        return RunFolder(self.runs / run)


def _continues(folder: RunFolder, flower_run: str) -> bool:
    """Whether the folder's script is the one to ask: the same run, or one that still waits."""
    return folder.flower_run == flower_run or not folder.is_over
