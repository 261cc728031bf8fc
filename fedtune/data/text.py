"""Bytes of a file as text: what is packed is unpacked, and the encoding is told or guessed."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from functools import cache
from logging import getLogger

import zstandard
from charset_normalizer import from_bytes

__all__ = ["BINARY", "BadText", "decode", "say_once", "unpack"]

log = getLogger(__name__)

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BINARY = {
    b"PK\x03\x04": "a zip archive or a workbook",
    b"%PDF": "a PDF",
    b"ARROW1": "an Arrow file",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
}
MARKS = (  # utf-32 before utf-16, whose mark is the beginning of it
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SAMPLE = 1 << 16  # bytes that are enough to guess from
WESTERN = frozenset(
    "àâäáãåæçèéêëìíîïñòóôöõøùúûüýÿßœÀÂÄÁÃÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÖÕØÙÚÛÜŒ€£§°²«»‘’“”„–—…·¿¡º\u00a0"
)


class BadText(Exception):
    """What is wrong with the bytes, as the end of `received ...: `."""


@cache
def say_once(text: str) -> None:
    """Log a warning, once a process: the same rows are read for every seed and arm."""
    log.warning("%s", text)


def unpack(content: bytes) -> bytes:
    """Content of a gzip or zstandard file, whatever its name; other bytes as they are.

    Raises:
        BadText: the archive is cut off or damaged.
    """
    try:
        if content.startswith(GZIP):
            return gzip.decompress(content)
        if content.startswith(ZSTD):
            return _unpack_zstd(content)
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise BadText(f"the archive is cut off or damaged ({error})") from None
    return content


def decode(content: bytes, name: str) -> str:
    """Text of `content` without its byte order mark; says in one line what is no UTF-8.

    Raises:
        BadText: bytes that are no text, or UTF-8 with a bad byte in it.
    """
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return _strict(content[len(mark) :], encoding, name)
    wide = _without_mark(content)
    if wide is not None:
        return _strict(content, wide, name)
    if b"\0" in content:
        raise BadText("it is no text: it has NUL bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return _guess(content, error, name)


def _strict(content: bytes, encoding: str, name: str) -> str:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise BadText(f"line {line} is not {encoding.upper()} ({error.reason})") from None
    if encoding != "utf-8":
        say_once(f"{name} is read as {encoding.upper()}.")
    return text


def _without_mark(content: bytes) -> str | None:
    """UTF-16 tells itself without a mark: every other byte of most characters is NUL."""
    sample = content[: SAMPLE & ~1]
    half = len(sample) // 2
    odd, even = sample[1::2].count(0), sample[::2].count(0)
    if half < 2 or max(odd, even) < half / 2 or min(odd, even) > half / 50:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _guess(content: bytes, error: UnicodeDecodeError, name: str) -> str:
    """Text in an encoding of one or more bytes a character, and a line that says which."""
    lines = [line for line in content.split(b"\n") if not line.isascii()]
    line = content[: error.start].count(b"\n") + 1
    damaged = content.decode("utf-8", "replace")
    whole = sum(not char.isascii() for char in damaged) - damaged.count("\ufffd")
    if whole > damaged.count("\ufffd"):
        raise BadText(f"line {line} is not UTF-8, though other lines are")
    found = from_bytes(b"\n".join(lines)[:SAMPLE]).best() if lines else None
    guess = "cp1252" if found is None else found.encoding
    for encoding in (["cp1252"] if _western(b"\n".join(lines)) else []) + [guess]:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        shown = text.split("\n")[line - 1].strip()[:40]
        say_once(
            f"{name} is not UTF-8: it is read as {encoding} (a guess), so that line {line} is "
            f"{shown!r}. If that is wrong, save the file as UTF-8."
        )
        return text
    raise BadText(f"line {line} is not UTF-8, nor in another encoding that can be told")


def _western(content: bytes) -> bool:
    """Whether cp1252 fits: its common letters, most of them in words with plain letters."""
    text = content[:SAMPLE].decode("cp1252", "replace")
    high = [char for char in text if not char.isascii()]
    words = [word for word in re.findall(r"\w+", text) if not word.isascii()]
    mixed = sum(any(char.isascii() for char in word) for word in words)
    common = sum(char in WESTERN for char in high)
    return common >= 0.95 * len(high) and (len(words) <= 2 or mixed >= len(words) / 2)


def _unpack_zstd(content: bytes) -> bytes:
    parts = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(content))
        if not frame.eof:
            raise EOFError("the last frame has no end")
        content = frame.unused_data
    return b"".join(parts)
