"""Did you mean ...?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A sentence with the known name closest to `name`, or with all of a short list.

    nearest("num_round", ["num_rounds"], prefix="--") -> "Did you mean --num_rounds?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"Did you mean {prefix}{near[0]}?"
    return f"Known: {', '.join(names)}." if len(names) <= 30 else "--help lists all names."
