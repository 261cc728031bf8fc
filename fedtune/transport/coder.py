"""From the messages of one push to what travels, and to what their receivers then have."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedtune.transport.bits import same_bits
from fedtune.transport.coded_records import MEANING, OLD, SEPARATOR, VERSION, as_record, join, wrap
from fedtune.transport.differences import SAME, Form, code, form_of
from fedtune.transport.messages import BASE
from fedtune.transport.settings import CodecSettings
from fedtune.transport.versions import Version, fingerprint

__all__ = ["Coder"]


class Coder:
    """Encodes messages; what is the same for several receivers, once.

    Args:
        refactors: whether every round's parameters are new factors: then there are no differences.

    `seconds` is what it has taken.
    """

    def __init__(self, settings: CodecSettings, refactors: bool) -> None:
        self._settings, self._refactors = settings, refactors
        self._done: dict[object, tuple[ArrayRecord | None, Version]] = {}
        self._meanings: dict[object, str] = {}
        self.seconds = 0.0

    def code(self, content: RecordDict, held: Version | None) -> tuple[RecordDict, Version]:
        """The message on the wire, and what its receiver then has, who has `held` now."""
        started = time.perf_counter()
        ids = tuple((name, id(record)) for name, record in content.array_records.items())
        key = (ids, held.name if held else None)
        if key not in self._done:
            self._done[key] = self._code(join(content), held)
        coded, version = self._done[key]
        facts = {
            **self._settings.record(),
            OLD: held.name if held else "",
            VERSION: version.name,
            MEANING: self._meaning(ids, content, version),
        }
        self.seconds += time.perf_counter() - started
        return wrap(content, coded, facts), version

    def _meaning(self, ids: object, content: RecordDict, version: Version) -> str:
        """What the parameters are: an update is added to those, so what came of them is all one.

        Where updates are no differences, they belong to what the client had.
        """
        if self._settings.up == "none" or not version.name:
            return version.name
        if ids not in self._meanings:
            self._meanings[ids] = fingerprint(join(content))
        return self._meanings[ids]

    def _code(
        self, tensors: dict[str, Tensor], held: Version | None
    ) -> tuple[ArrayRecord | None, Version]:
        if self._settings.down == "none":
            return None, Version("", tensors, tensors)
        known = held or Version("", {}, {})
        forms = {name: self._form(name, tensor, known) for name, tensor in tensors.items()}
        coded = code(tensors, forms, known.received)
        received = {**known.received, **coded.received}
        return as_record(coded.data), Version.of(received, {**known.meant, **tensors})

    def _form(self, name: str, tensor: Tensor, known: Version) -> Form:
        if name in known.meant and same_bits(known.meant[name], tensor):
            return Form(SAME)
        # What is added to the base is its own product, whose factors are new each time.
        unlike = self._refactors or name.startswith(BASE + SEPARATOR)
        old = None if unlike else known.received.get(name)
        own_name = name.partition(SEPARATOR)[2]
        return form_of(own_name, tensor, old, self._settings.down, self._settings)
