"""Arms that do not depend on the strategy: run once for several, in the top level's `arms/`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.compare.arms import ArmInput, run_arm
from fedtune.compare.directory import RESULT
from fedtune.files import read_json, write_json
from fedtune.transport.versions import fingerprint

__all__ = ["SharedArms"]

BASIS = "basis"  # of a kept result: what it was made from

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedArms:
    """Where they lie: `arms/` of one seed, `arms/seeds/<s>/` of several."""

    directory: Path

    def of_seed(self, seed: int) -> SharedArms:
        """Those of one of several seeds."""
        return SharedArms(self.directory / "seeds" / str(seed))

    def result(self, name: str, given: ArmInput) -> dict[str, Any]:
        """The arm as another strategy has run it, if it would be the same; else it is run here.

        One whose start or samples differ, as under a strategy that changes who takes part, lies
        with its own strategy.
        """
        kept, basis = self.directory / name / RESULT, _basis(given)
        if kept.is_file():
            found: dict[str, Any] = read_json(kept)
            if found.pop(BASIS) == basis:
                return found
            log.warning("the arm %s is not that of the strategies before: it is run anew", name)
            return run_arm(name, given)
        result = run_arm(name, replace(given, directory=self.directory))
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {**result, BASIS: basis})
        return result


def _basis(given: ArmInput) -> dict[str, Any]:
    """All that an arm takes of the federated run."""
    built = given.built
    counts = {key: [record[key] for record in given.history] for key in ("samples", "tokens")}
    return {"start": fingerprint({**built.static, **built.params}), **counts}
