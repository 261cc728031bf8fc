"""What crosses the site's socket: one frame per message, a JSON header and the arrays' raw bytes.

A frame is `length of the header (4 bytes, big endian) | header (JSON, UTF-8) | data`. Nothing is
ever unpickled; arrays stay as opaque as Flower delivers them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedtune.errors import FrameError

__all__ = ["MAX_FRAME_BYTES", "STARTING", "Frame", "decode", "encode", "request_key"]

MAX_FRAME_BYTES = 2**31 - 1  # what one message of multiprocessing.connection holds
STARTING = "starting"  # in the config of a reply: the trainer is not there yet
VERSION = 1
LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Frame:
    """A request or a reply; `error` says why there is no reply."""

    kind: str
    content: RecordDict
    error: str | None = None


def encode(kind: str, content: RecordDict | None = None, *, error: str | None = None) -> bytes:
    """One frame. Raises FrameError when a record holds what JSON does not."""
    content = RecordDict() if content is None else content
    chunks: list[bytes] = []
    arrays = {}
    for name, record in content.array_records.items():
        arrays[name] = [
            [key, array.dtype, list(array.shape), array.stype, len(array.data)]
            for key, array in record.items()
        ]
        chunks += [array.data for array in record.values()]
    header = {
        "version": VERSION,
        "kind": kind,
        "error": error,
        "arrays": arrays,
        "metrics": {name: dict(record) for name, record in content.metric_records.items()},
        "config": {name: dict(record) for name, record in content.config_records.items()},
    }
    try:
        text = json.dumps(header).encode()
    except TypeError as problem:
        raise FrameError(f"frame: expected numbers and text beside arrays; {problem}.") from None
    return b"".join([LENGTH.pack(len(text)), text, *chunks])


def decode(frame: bytes) -> Frame:
    """The message in a frame. Raises FrameError when it is cut, padded or not a frame at all."""
    try:
        return _decode(frame)
    except FrameError:
        raise
    except Exception as problem:  # bytes from outside may be wrong in any way
        raise FrameError(
            f"frame: expected a fedtune message, received {len(frame)} bytes that are none "
            f"({type(problem).__name__}: {problem}). Use the same fedtune on both sides."
        ) from None


def request_key(kind: str, content: RecordDict) -> str:
    """Recognises a repeated request: kind, run, round, manifest and sha256 of the tensors sent.

    Coded ones count as what the server says that they mean (`transport/coder.py`).
    """
    config = content.config_records.get("config", ConfigRecord())
    coded = content.config_records.get("codec", ConfigRecord())
    meaning = coded.get("meaning", coded.get("version"))  # a set-up has no meaning
    what = [kind, *(config.get(name) for name in ("run", "round", "manifest")), meaning]
    digest = hashlib.sha256(json.dumps(what).encode())
    for name in sorted(content.array_records.keys() - {"coded"}):
        record = content.array_records[name]
        for key in sorted(record):
            data = record[key].data
            digest.update(json.dumps([name, key, len(data)]).encode())
            digest.update(data)
    return digest.hexdigest()


def _decode(frame: bytes) -> Frame:
    (length,) = LENGTH.unpack_from(frame)
    start = LENGTH.size + length
    header: dict[str, Any] = json.loads(frame[LENGTH.size : start])
    if header["version"] != VERSION:
        raise FrameError(
            f"frame: expected version {VERSION}, received {header['version']}. Use the same "
            "fedtune on both sides."
        )
    content = RecordDict()
    for name, rows in header["arrays"].items():
        record = ArrayRecord()
        for key, dtype, shape, stype, size in rows:
            if size < 0 or start + size > len(frame):
                raise FrameError(f"frame: array {key} is cut off; send it again.")
            record[key] = Array(dtype, tuple(shape), stype, frame[start : start + size])
            start += size
        content[name] = record
    if start != len(frame):
        raise FrameError(f"frame: {len(frame) - start} bytes too many; send it again.")
    for name, values in header["metrics"].items():
        content[name] = MetricRecord(values)
    for name, values in header["config"].items():
        content[name] = ConfigRecord(values)
    kind, error = header["kind"], header["error"]
    if not isinstance(kind, str) or not isinstance(error, str | None):
        raise TypeError("kind and error are text")
    return Frame(kind, content, error)
