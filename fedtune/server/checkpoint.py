"""The server's durable state: one directory per durable round, written whole, the last two kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.adapters import Manifest, check
from fedtune.errors import ConfigError
from fedtune.files import read_json, replace_directory, to_json, write_text
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.lora.manifests import joined

__all__ = ["KEPT", "ServerState", "load_latest", "save"]

KEPT = 2
SEPARATOR = "|"  # between a tensor's name and a state key; no parameter name contains it


@dataclass
class ServerState:
    """All that the next round depends on.

    Attributes:
        round: last finished round; 0 before the first.
        params: the global parameters after it.
        static: frozen adapter tensors, sent once.
        manifest: what the parameters obey.
        method_state: tensors of the method, per parameter.
        base: what the method has added to the base.
        control_clients: clients that SCAFFOLD's control variate is a mean over.
        client_rounds: last round whose update was taken, per client.
        durable: `client_rounds` of the durable rounds that are kept, by round.
        history: one record per round, index 0 before training.
        best: round and loss of the best global model; round 0 where no round beat it.
    """

    round: int
    params: dict[str, Tensor]
    static: dict[str, Tensor]
    manifest: Manifest
    method_state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: Cumulative = field(default_factory=Cumulative)
    control_clients: int = 0
    client_rounds: dict[str, int] = field(default_factory=dict)
    durable: dict[int, dict[str, int]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)

    def as_built(self, built: Manifest) -> ServerState:
        """The same tensors as the start of another run, in which all that a model trains travels.

        Args:
            built: the manifest of that model, with its own ranks.
        """
        tensors = {**self.static, **self.params}
        params = {name: tensors[name] for name in sorted(built.entries)}
        static = {name: tensors[name] for name in sorted(built.static)}
        return ServerState(0, params, static, built)

    def whole(self) -> tuple[dict[str, Tensor], Manifest]:
        """The global adapter as an ordinary one: what was added to the base is in its factors."""
        return joined(self.params, self.manifest, self.base)

    def keep_rounds(self, client: str) -> list[int]:
        """Rounds whose state of this client may still be needed."""
        kept = {rounds.get(client, 0) for rounds in self.durable.values()}
        return sorted((kept | {self.client_rounds.get(client, 0)}) - {0})


def save(directory: Path, state: ServerState) -> None:
    """Write `directory/round-NNNN` whole, then drop all but the last two."""
    state.durable[state.round] = dict(state.client_rounds)
    for old in sorted(state.durable)[:-KEPT]:
        del state.durable[old]
    with replace_directory(directory / f"round-{state.round:05d}") as fresh:
        save_file(_contiguous(state.params), fresh / "params.safetensors")
        save_file(_contiguous(state.static), fresh / "static.safetensors")
        save_file(
            {
                f"{name}{SEPARATOR}{key}": tensor.contiguous()
                for name, tensors in state.method_state.items()
                for key, tensor in tensors.items()
            },
            fresh / "method.safetensors",
        )
        save_file(_contiguous(state.base.tensors()), fresh / "base.safetensors")
        write_text(fresh / "manifest.json", state.manifest.to_json())
        write_text(fresh / "state.json", _plain(state))
    for old_directory in _rounds(directory)[:-KEPT]:
        shutil.rmtree(old_directory, ignore_errors=True)


def load_latest(directory: Path) -> ServerState | None:
    """The state of the last durable round, or None when no round is durable yet."""
    rounds = _rounds(directory)
    if not rounds:
        return None
    latest = rounds[-1]
    try:
        plain = read_json(latest / "state.json")
        method_state: dict[str, dict[str, Tensor]] = {}
        for joined, tensor in load_file(latest / "method.safetensors").items():
            name, key = joined.rsplit(SEPARATOR, 1)
            method_state.setdefault(name, {})[key] = tensor
        state = ServerState(
            round=int(plain["round"]),
            params=load_file(latest / "params.safetensors"),
            static=load_file(latest / "static.safetensors"),
            manifest=Manifest.read(latest / "manifest.json"),
            method_state=method_state,
            base=Cumulative.of(load_file(latest / "base.safetensors"), plain["base_error"]),
            control_clients=plain["control_clients"],
            client_rounds=plain["client_rounds"],
            durable={int(number): rounds for number, rounds in plain["durable"].items()},
            history=plain["history"],
            best=plain["best"],
        )
        check(state.params, state.manifest)
        check(state.static, state.manifest, static=True)
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f"--resume: expected a whole server state in {latest}, received one that cannot be "
            f"read ({error}); delete that directory to go back one durable round."
        ) from None


def _plain(state: ServerState) -> str:
    plain = {
        "round": state.round,
        "control_clients": state.control_clients,
        "base_error": dict(state.base.error),
        "client_rounds": state.client_rounds,
        "durable": state.durable,
        "history": state.history,
        "best": state.best,
    }
    return to_json(plain) + "\n"


def _rounds(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("round-*") if (path / "state.json").is_file())


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
