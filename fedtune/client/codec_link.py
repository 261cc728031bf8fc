"""A client's end of coded transport: decodes what comes, encodes what goes, remembers on disk.

version-*.safetensors    tensors as this client has them: those that the last message was a
                         difference to, and those that it made
residual/round-*         what the codec has lost of this client's updates by the end of a round

Nothing is kept in memory, so a script that is started again, or another process of a simulation,
goes on where the last one was. What is not on disk costs one whole message.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flwr.app import RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedtune.client.replies import manifest_of
from fedtune.client.round_files import RoundFiles
from fedtune.errors import FrameError
from fedtune.files import write_bytes
from fedtune.transport.coded_records import (
    OLD,
    SECONDS,
    SEPARATOR,
    VERSION,
    as_record,
    bytes_in,
    facts_of,
    join,
    restore,
    wrap,
)
from fedtune.transport.differences import Form, code, form_of, undo
from fedtune.transport.messages import ARRAYS, CONTROL, RoundTask
from fedtune.transport.settings import CodecSettings
from fedtune.transport.versions import fingerprint

__all__ = ["CodecLink", "Opened", "Seal"]

Seal = Callable[[RecordDict], RecordDict]


class Opened(NamedTuple):
    """A request as the server meant it.

    Attributes:
        seal: from the reply to what travels; raises ManifestError on values that no codec takes.
    """

    content: RecordDict
    seal: Seal


class CodecLink:
    """What one client keeps in one directory.

    Args:
        own: the parameters as its model has them, by name; empty where they cannot be told.
    """

    def __init__(self, directory: Path, own: Callable[[], Mapping[str, Tensor]]) -> None:
        self._directory, self._own = directory, own
        self._residual = RoundFiles(directory / "residual")

    def open(self, content: RecordDict) -> Opened | None:
        """Decode a request; None when it is a difference to what is not here: answer `resend()`.

        Raises:
            FrameError: its bytes are not what a server sends.
        """
        started = time.perf_counter()
        facts, data = facts_of(content), bytes_in(content)
        if not facts:
            return Opened(content, lambda reply: reply)
        if OLD not in facts:
            return Opened(restore(content, None), partial(self._greet, content))
        tensors = None
        if data is not None:
            old = self._version(str(facts[OLD]))
            if old is None:
                return None
            try:
                tensors = undo(data, old)
            except FrameError:
                if old and fingerprint(old) != str(facts[OLD]):
                    return None  # the fault lies in the file
                raise
            if not self._keep(str(facts.get(VERSION)), {**old, **tensors}, str(facts[OLD])):
                return None
        opened = restore(content, tensors)
        settings, version = CodecSettings.from_record(facts), str(facts.get(VERSION))
        answer = _Answer(settings, version, opened, self._residual)
        answer.seconds = time.perf_counter() - started
        return Opened(opened, answer.seal)

    def forget(self) -> None:
        """Delete all: the run is over."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _greet(self, setup: RecordDict, reply: RecordDict) -> RecordDict:
        """Say whether the run's first parameters are here: kept from before, or in the model."""
        name = str(facts_of(setup).get(VERSION))
        if any(self._directory.glob("version-*")):
            there = self._file(name).is_file()
        else:
            own, entries = self._own(), manifest_of(setup).entries
            tensors = {f"{ARRAYS}{SEPARATOR}{n}": own[n] for n in entries if n in own}
            there = self._keep(name, tensors, "")
        return wrap(reply, None, {VERSION: name if there else ""})

    def _version(self, name: str) -> dict[str, Tensor] | None:
        """Tensors kept under a name; none for the empty name."""
        if not name:
            return {}
        file = self._file(name)
        try:
            return load_file(file) if file.is_file() else None
        except SafetensorError:
            return None

    def _keep(self, name: str, tensors: Mapping[str, Tensor], old: str) -> bool:
        """Keep a version beside the one before; whether it is what its name says."""
        if fingerprint(tensors) != name:
            return False
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._file(name)
        if name != old:  # else it was read just now
            write_bytes(file, save({key: tensor.contiguous() for key, tensor in tensors.items()}))
        for other in set(self._directory.glob("version-*.safetensors")) - {file, self._file(old)}:
            other.unlink(missing_ok=True)
        return True

    def _file(self, version: str) -> Path:
        return self._directory / f"version-{version}.safetensors"


class _Answer:
    """Encodes the reply to one request, which led to `version`."""

    def __init__(
        self, settings: CodecSettings, version: str, request: RecordDict, residual: RoundFiles
    ) -> None:
        self._settings, self._version = settings, version
        self._request, self._residual = request, residual
        self.seconds = 0.0  # spent on the request

    def seal(self, reply: RecordDict) -> RecordDict:
        """The reply as it travels."""
        tensors = join(reply)
        if self._settings.up == "none" or not tensors:
            return wrap(reply, None, self._facts())
        started = time.perf_counter()
        old, task = join(self._request), RoundTask.of(self._request)
        forms = {name: self._form(name, tensor, old.get(name)) for name, tensor in tensors.items()}
        if self._settings.feedback:
            # What was lost of other factors is no part of these.
            lost = {} if task.new_factors else self._residual.read(task.resume_round) or {}
            coded = code(tensors, forms, old, residual=_fitting(lost, tensors))
            needed = (*task.keep_rounds, task.resume_round)
            self._residual.write(task.round, coded.residual, needed)
        else:
            coded = code(tensors, forms, old)
        self.seconds += time.perf_counter() - started
        return wrap(reply, as_record(coded.data), self._facts())

    def _facts(self) -> dict[str, str | float]:
        return {VERSION: self._version, SECONDS: self.seconds}

    def _form(self, name: str, tensor: Tensor, old: Tensor | None) -> Form:
        record, _, own_name = name.partition(SEPARATOR)
        changed = record == CONTROL  # which is what c_k changes by
        return form_of(
            own_name, tensor, old, self._settings.up, self._settings, is_difference=changed
        )


def _fitting(lost: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what cannot have been lost of these: a file may be damaged, or of another rank."""

    def fits(name: str, tensor: Tensor) -> bool:
        whole = tensor.is_floating_point() and bool(tensor.isfinite().all())
        return name not in tensors or (whole and tensor.shape == tensors[name].shape)

    return {name: tensor for name, tensor in lost.items() if fits(name, tensor)}
