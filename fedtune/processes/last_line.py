"""The last line of a command, whether or not anybody can read it any more."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TextIO

__all__ = ["say_last", "words_of"]


def say_last(text: str, stream: TextIO) -> None:
    """Print `text`; where the terminal or pipe is gone, what is left to print goes nowhere.

    Otherwise Python would end with a status of its own.
    """
    try:
        print(text, end="\n" if text else "", file=stream, flush=True)
    except OSError:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def words_of(error: OSError) -> str:
    """What the system refused, of which file, and what to do."""
    if error.filename is None:
        if error.errno == errno.ENOENT and "temporary" in str(error):
            return f"{error.strerror}. Set TMPDIR to a directory that can be written."
        if error.errno == errno.ENOENT:
            return "the working directory is gone. Change to one that exists."
        return f"{error.strerror or error}."
    fix = "Check its disk and permissions, or choose another directory"
    return f"cannot use {error.filename}: {error.strerror}. {fix}."
