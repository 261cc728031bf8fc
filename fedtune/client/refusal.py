"""A site whose settings do not fit the run: starting its script again would not help."""

from __future__ import annotations

from contextlib import suppress

from fedtune.errors import ConfigError, DataError, ManifestError, SiteError
from fedtune.failures import failure_of
from fedtune.relay.folder import RunFolder

__all__ = ["note_refusal"]

SETTINGS = (ConfigError, DataError, ManifestError, SiteError)


def note_refusal(folder: RunFolder | None, error: BaseException) -> None:
    """Tell `fedtune join`, where the error is one of settings: base, adapter, rows, limits."""
    if folder is not None and isinstance(error, SETTINGS):
        with suppress(OSError):  # then it is started again
            folder.write_refusal(failure_of(error).outside)
