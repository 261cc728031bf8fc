"""Records of a message whose tensors travel coded, all in one array.

arrays, control, base --join--> tensors by `record/name` --code--> one array of bytes
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedtune.transport.codecs.base import refused
from fedtune.transport.records import params_of, to_arrays

__all__ = [
    "MEANING",
    "OLD",
    "RESEND",
    "SECONDS",
    "SEPARATOR",
    "VERSION",
    "as_record",
    "bytes_in",
    "facts_of",
    "join",
    "resend",
    "restore",
    "wrap",
]

CODED, CODEC, RESEND = "coded", "codec", "resend"
OLD, VERSION = "old", "version"  # what differences are to, and what is there after them
MEANING = "meaning"  # by which a client recognises a request that it has answered already
SECONDS = "seconds"  # that a client needed for decoding and encoding
STYPE = "fedtune.coded"
SEPARATOR = "/"


def join(content: RecordDict) -> dict[str, Tensor]:
    """All tensors of a message, in the records' own bytes."""
    return {
        f"{record}{SEPARATOR}{name}": tensor
        for record, arrays in content.array_records.items()
        for name, tensor in params_of(arrays, shared=True).items()
    }


def as_record(data: bytes) -> ArrayRecord:
    """Coded tensors as one array."""
    return ArrayRecord({CODED: Array("uint8", (len(data),), STYPE, data)})


def wrap(content: RecordDict, coded: ArrayRecord | None, facts: Mapping[str, object]) -> RecordDict:
    """The message with `coded` in place of its arrays, None to leave them, and what says how."""
    plain = {
        name: record
        for name, record in content.items()
        if coded is None or not isinstance(record, ArrayRecord)
    }
    wrapped = RecordDict({**plain, CODEC: ConfigRecord(dict(facts))})  # type: ignore[arg-type]
    if coded is not None:
        wrapped[CODED] = coded
    return wrapped


def bytes_in(content: RecordDict) -> bytes | None:
    """The coded tensors of a message; None when they are not coded."""
    record = content.array_records.get(CODED, ArrayRecord())
    found = [(name, array.stype) for name, array in record.items()]
    return record[CODED].data if found == [(CODED, STYPE)] else None


def facts_of(content: RecordDict) -> ConfigRecord:
    """How a message is coded; empty when it is not."""
    return content.config_records.get(CODEC, ConfigRecord())


def restore(content: RecordDict, tensors: Mapping[str, Tensor] | None) -> RecordDict:
    """Inverse of `join` and `wrap`; without `tensors` the arrays are there already.

    Raises:
        FrameError: a tensor belongs to a record that is there already.
    """
    plain = {name: record for name, record in content.items() if name not in (CODED, CODEC)}
    restored = RecordDict(plain)
    records: dict[str, dict[str, Tensor]] = {}
    for joined, tensor in sorted((tensors or {}).items()):
        record, _, name = joined.partition(SEPARATOR)
        records.setdefault(record, {})[name] = tensor
    for record, named in records.items():
        if record in plain:
            raise refused("tensors and plain records apart", f"both in {record!r}")
        restored[record] = to_arrays(named)
    return restored


def resend() -> RecordDict:
    """The answer of a client that does not have what a message is a difference to."""
    return RecordDict({RESEND: ConfigRecord()})
