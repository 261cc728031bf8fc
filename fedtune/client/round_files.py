"""Tensors of a client after each of its rounds: one file a round, for those that may come again.

A round starts from the file of the last round whose update the server took, so a refused update, a
repeated round and a resumed run roll the client back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedtune.files import write_bytes

__all__ = ["RoundFiles"]


class RoundFiles:
    """The files of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, server_round: int) -> dict[str, Tensor] | None:
        """What was kept after a round; None when there is no such file, or not a whole one."""
        file = self.file(server_round)
        try:
            return load_file(file) if file.is_file() else None
        except SafetensorError:
            return None

    def write(
        self, server_round: int, tensors: Mapping[str, Tensor], still_needed: Iterable[int]
    ) -> None:
        """Keep the state after a round, and of earlier rounds those still needed."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_bytes(self.file(server_round), save(whole))
        wanted = {self.file(number) for number in (*still_needed, server_round)}
        for file in set(self._directory.glob("round-*.safetensors")) - wanted:
            file.unlink(missing_ok=True)

    def file(self, server_round: int) -> Path:
        """Where the state after a round rests."""
        return self._directory / f"round-{server_round:05d}.safetensors"
