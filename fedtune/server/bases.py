"""The base weights that a run's sites must have: those of most of them when it began.

One fingerprint for each combination of dtypes is kept, so that sites of one dtype are held against
each other bit by bit, whatever the first one had.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from fedtune.adapters.fingerprint import Fingerprint, disagreement, unseen
from fedtune.files import read_json, write_json

__all__ = ["Bases"]

log = logging.getLogger(__name__)

ADVICE = (
    "Load the same checkpoint everywhere. What each site would draw anew (added embedding rows, a "
    "head) is saved once and given to all, or trained: modules_to_save, trainable_token_indices."
)


class Bases:
    """Fingerprints of sites that agree.

    Args:
        file: where they are kept for a run that is resumed.
        resume: whether to begin with those in the file.
    """

    def __init__(self, file: Path | None = None, *, resume: bool = False) -> None:
        self._file = file
        self._known: list[tuple[str, Fingerprint]] = []
        self._said: set[str] = set()
        if resume and file is not None and file.is_file():
            kept: list[list[str]] = read_json(file)
            self._known = [(site, Fingerprint.from_json(text)) for site, text in kept]

    def choose(self, sites: Mapping[str, Fingerprint | None]) -> None:
        """Take the base of most sites, of the first by name among as many; not a second time."""
        if self._known:
            return
        groups: list[dict[str, Fingerprint]] = []
        for site, base in sorted(sites.items()):
            if base is None:
                continue
            for group in groups:
                if not any(disagreement(other, base) for other in group.values()):
                    group[site] = base
                    break
            else:
                groups.append({site: base})
        for site, base in max(groups, key=len, default={}).items():
            self._keep(site, base)

    def objection(self, base: Fingerprint | None) -> str:
        """Why a site with this base cannot take part, in one line; empty if it can."""
        for site, known in self._known:
            if base is not None and (where := disagreement(known, base)):
                return f"base weights: expected those of {site}, received others: {where}. {ADVICE}"
        return ""

    def accept(self, site: str, base: Fingerprint | None) -> None:
        """A site without an objection takes part; what cannot be known of it is said once."""
        if base is None and self._known:
            self._say(f"{site}: it does not say on which base weights it trains")
        if base is None:
            return
        self._keep(site, base)
        if doubt := unseen(self._known[0][1], base):
            self._say(f"{site}: base weights look equal; {doubt}")

    def _keep(self, site: str, base: Fingerprint) -> None:
        if any(known.kinds == base.kinds for _, known in self._known):
            return
        self._known.append((site, base))
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, [[name, known.to_json()] for name, known in self._known])

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            log.warning("%s", words)
