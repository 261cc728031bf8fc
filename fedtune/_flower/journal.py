"""How far one task has come. Written by the ClientApp's process, read after that was killed."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["Journal"]


class Journal:
    """Small files in a private directory; each is there whole or not at all."""

    INPUT, MESSAGE = "input", "message"  # Flower's answers, which it gives once only
    REPLYING, DONE = "replying", "done"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True)

    def write(self, name: str, data: bytes = b"") -> None:
        """Note `name`; it survives the process, not the machine."""
        fresh = self.directory / f".{name}"
        fresh.write_bytes(data)
        fresh.rename(self.directory / name)

    def read(self, name: str) -> bytes | None:
        """What was noted, or None."""
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """Whether `name` was noted."""
        return (self.directory / name).exists()

    def delete(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
