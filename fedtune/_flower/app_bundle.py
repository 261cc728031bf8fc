"""A Flower app as one file (FAB), and a hash that both sides of a federation can compare."""

from __future__ import annotations

import hashlib
import json
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

from fedtune.errors import SiteError

__all__ = ["build_app", "hash_app"]

PROJECT, LISTING = "pyproject.toml", ".info/CONTENT"
MAX_FILE_BYTES = 2**20


def build_app(directory: Path) -> bytes:
    """What `flwr run` would send for the app in `directory`."""
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(directory)


def hash_app(bundle: bytes) -> str:
    """sha256 over the names and contents of an app's files; raises SiteError when it is no app.

    Not over the bundle's own bytes: those change with the zlib and the TOML writer that made it.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(BytesIO(bundle)) as archive:
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
                if entry.filename == LISTING:  # sizes and hashes of the other files
                    continue
                if entry.file_size > MAX_FILE_BYTES:
                    raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
                content = archive.read(entry)
                if entry.filename == PROJECT:
                    parsed = tomllib.loads(content.decode())
                    content = json.dumps(parsed, sort_keys=True).encode()
                for part in (entry.filename.encode(), content):
                    digest.update(len(part).to_bytes(8, "big") + part)
    except Exception as problem:  # bytes from outside: zipfile, zlib and tomllib raise many kinds
        raise SiteError(
            f"app: expected a Flower app bundle, received {len(bundle)} bytes that are none "
            f"({type(problem).__name__}: {problem}). Submit the run with fedtune submit."
        ) from None
    return digest.hexdigest()
