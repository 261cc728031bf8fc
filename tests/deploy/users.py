"""Programs of another user of this host, in tests that root runs."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["OTHER", "THIRD", "as_user", "needs_users"]

OTHER, THIRD = 64001, 64002  # user ids that nobody has

needs_users = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="to be another user takes root and setpriv",
)


def as_user(uid: int | None) -> list[str]:
    """What stands before a command; it may read root's files still, such as this Python."""
    if uid is None:
        return []
    return [
        *("setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"),
        *("--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--"),
    ]
