"""Errors a user can act on. Each message says what, expected, received and fix, in one line.

FedtuneError
├── ConfigError      flags, YAML values and their combinations
├── DataError        files, columns, partitions
├── ManifestError    parameters that do not match the adapter they are meant for
├── FrameError       bytes on a site's socket that are no message
├── SiteError        a site that refuses a run, or whose trainer is absent, silent or has ended
├── DeployError      a process of a deployment that has ended, or an address that does not answer
└── RoundError       a federation that cannot go on
    └── RunStopped   because it was asked to end

A message may hold parts that must not leave the process's own site, such as a value of a row:
`private` marks them, and `outside` leaves them out.
"""

import re

__all__ = [
    "ConfigError",
    "DataError",
    "DeployError",
    "FedtuneError",
    "FrameError",
    "ManifestError",
    "RoundError",
    "RunStopped",
    "SiteError",
    "private",
]

# Marks around a part of a message; not seen by anyone, as `FedtuneError` takes them off.
BEGIN, END = "\ue000", "\ue001"
MARKS = re.compile(f"[{BEGIN}{END}]")
MARKED = re.compile(f"{BEGIN}[^{END}]*{END}?")


def private(text: object) -> str:
    """Text of a value that stays at the site, for the message of a `FedtuneError`."""
    return f"{BEGIN}{MARKS.sub('', str(text))}{END}"


class FedtuneError(Exception):
    """Base of all errors that fedtune raises on purpose.

    Attributes:
        outside: the message for another site or host, without its private parts.
        is_private: whether it has any.
        marked: the message with its marks, to be part of another one's.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(MARKS.sub("", message))
        self.outside = MARKS.sub("", MARKED.sub("\N{HORIZONTAL ELLIPSIS}", message))
        self.is_private = BEGIN in message
        self.marked = message


class ConfigError(FedtuneError, ValueError):
    """A setting is unknown, out of range, or does not go together with another one."""


class DataError(FedtuneError, ValueError):
    """A data file, column or partition cannot give every client what it needs."""


class ManifestError(FedtuneError, ValueError):
    """Parameters differ from the manifest: a key, shape, dtype or value; the message names it."""


class FrameError(FedtuneError, ValueError):
    """A message on a site's socket is malformed, cut or too large."""


class RoundError(FedtuneError, RuntimeError):
    """Too many rounds failed, or no client can take part."""


class RunStopped(RoundError):
    """`fedtune stop` ended the run between two rounds."""


class SiteError(FedtuneError, RuntimeError):
    """A site refuses a run, or its trainer is absent, silent, or has ended."""


class DeployError(FedtuneError, RuntimeError):
    """A process of a deployment has ended, or an address does not answer as it should."""
