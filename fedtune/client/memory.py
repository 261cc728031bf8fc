"""What a method has a client keep between its rounds (`round_files.py`).

control     c_k of SCAFFOLD
personal    the parameters that stay with the client
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedtune.client.round_files import RoundFiles
from fedtune.errors import ConfigError

__all__ = ["ClientMemory", "Kept"]

SEPARATOR = "|"  # between the kind and a tensor's name


@dataclass(frozen=True)
class Kept:
    """Tensors of one client after one of its rounds; empty before the first."""

    control: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All of them, named `kind|name`."""
        return {
            f"{kind}{SEPARATOR}{name}": tensor
            for kind, tensors in vars(self).items()
            for name, tensor in tensors.items()
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Kept:
        """Inverse of `tensors`."""
        kinds: dict[str, dict[str, Tensor]] = {"control": {}, "personal": {}}
        for joined, tensor in tensors.items():
            kind, name = joined.split(SEPARATOR, 1)
            kinds[kind][name] = tensor
        return cls(**kinds)


class ClientMemory:
    """The files of one client."""

    def __init__(self, directory: Path) -> None:
        self._files = RoundFiles(directory)

    def read(self, server_round: int) -> Kept:
        """What was kept after a round; nothing for round 0.

        Raises:
            ConfigError: there is no file of that round.
        """
        if not server_round:
            return Kept()
        tensors = self._files.read(server_round)
        if tensors is None:
            raise self.lost(server_round)
        return Kept.of(tensors)

    def write(self, server_round: int, kept: Kept, still_needed: Iterable[int]) -> None:
        """Keep the state after a round, and of earlier rounds those still needed."""
        self._files.write(server_round, kept.tensors(), still_needed)

    def lost(self, server_round: int) -> ConfigError:
        """The error for a file that should be there."""
        return ConfigError(
            f"client state: expected that of round {server_round} in {self.file(server_round)}, "
            "found none: it was lost, or that round had another --strategy. Start again with "
            "--overwrite, or submit a new run."
        )

    def file(self, server_round: int) -> Path:
        """Where the state after a round rests."""
        return self._files.file(server_round)
