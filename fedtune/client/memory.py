"""What a method has a client keep between its rounds: one file of tensors for every round.

    control     c_k of SCAFFOLD
    personal    the parameters that stay with the client

A round starts from the file of the last round whose update the server took, so a refused update, a
repeated round and a resumed run roll the client back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from fedtune.errors import ConfigError
from fedtune.files import write_bytes

__all__ = ["ClientMemory", "Kept"]

SEPARATOR = "|"  # between the kind and a tensor's name


@dataclass(frozen=True)
class Kept:
    """Tensors of one client after one of its rounds; empty before the first."""

    control: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As safetensors."""
        return save(
            {
                f"{kind}{SEPARATOR}{name}": tensor.contiguous()
                for kind, tensors in vars(self).items()
                for name, tensor in tensors.items()
            }
        )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Kept:
        """From tensors named `kind|name`."""
        kinds: dict[str, dict[str, Tensor]] = {"control": {}, "personal": {}}
        for joined, tensor in tensors.items():
            kind, name = joined.split(SEPARATOR, 1)
            kinds[kind][name] = tensor
        return cls(**kinds)


class ClientMemory:
    """The files of one client."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, server_round: int) -> Kept:
        """What was kept after a round; nothing for round 0.

        Raises:
            ConfigError: there is no file of that round.
        """
        if not server_round:
            return Kept()
        file = self.file(server_round)
        if not file.is_file():
            raise self.lost(server_round)
        return Kept.of(load_file(file))

    def write(self, server_round: int, kept: Kept, still_needed: Iterable[int]) -> None:
        """Keep the state after a round, and of earlier rounds those still needed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        write_bytes(self.file(server_round), kept.to_bytes())
        wanted = {self.file(number) for number in (*still_needed, server_round)}
        for file in set(self._directory.glob("round-*.safetensors")) - wanted:
            file.unlink(missing_ok=True)

    def lost(self, server_round: int) -> ConfigError:
        """The error for a file that should be there."""
        return ConfigError(
            f"client state: expected that of round {server_round} in {self.file(server_round)}, "
            "found none: it was lost, or that round had another --strategy. Start again with "
            "--overwrite, or submit a new run."
        )

    def file(self, server_round: int) -> Path:
        """Where the state after a round rests."""
        return self._directory / f"round-{server_round:05d}.safetensors"
