"""What a summary says of a run beside what was measured; in `run.json` before the first round."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from fedtune.config import Arguments, FederationArguments, TransportArguments
from fedtune.files import read_json
from fedtune.output_dir import MARKER

__all__ = ["Facts", "settings_of", "versions"]

PACKAGES = ("fedtune", "torch", "transformers", "peft", "accelerate", "datasets", "trl", "flwr")


@dataclass(frozen=True)
class Facts:
    """Known when a run begins.

    Attributes:
        config: every setting by group.
        seeds: one whole run each.
        arms: what the federated run is compared with, in the order in which they are run.
        clients: their rows and tokens; empty where they are at sites.
        full_bytes: of the whole base model, 0 where that is not known.
        base_loss: held-out loss of the base model alone, None where that is not known.
        own_rows: how many of the held-out rows are like each client's own, None where they cannot
            be told apart.
        files: path -> sha256 of every file that was read; hub id -> revision.
        identity: rows, base model and tokenizer by content (`fedtune.run.identity`).
    """

    config: dict[str, Any]
    seeds: list[int]
    arms: list[str] = field(default_factory=list)
    clients: list[dict[str, Any]] = field(default_factory=list)
    full_bytes: int = 0
    base_loss: float | None = None
    own_rows: dict[str, int] | None = None
    files: dict[str, str] = field(default_factory=dict)
    identity: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def federation(self) -> FederationArguments:
        """Settings of the federation."""
        return FederationArguments(**_known(FederationArguments, self.config["federation"]))

    @property
    def transport(self) -> TransportArguments:
        """Settings of the transport."""
        return TransportArguments(**_known(TransportArguments, self.config["transport"]))

    @property
    def given(self) -> dict[str, Any]:
        """What a run was given, under the keys of its summary."""
        who = {"clients": self.clients, "files": self.files}
        return {
            "data": {**self.identity.get("data", {}), **who},
            "model": self.identity.get("model", {}),
            "config": self.config,
            "versions": self.versions,
        }

    def to_json(self) -> dict[str, Any]:
        """As `run.json` holds them."""
        return asdict(self)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Of the run in `directory`; None where it holds none, or one of before there were any."""
        try:
            plain = read_json(directory / MARKER)["facts"]
            return cls(**_known(cls, plain))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def settings_of(args: Arguments) -> dict[str, Any]:
    """Every setting by group, as JSON values."""
    groups: dict[str, Any] = {
        "model": args.model,
        "adapter": args.adapter,
        "data": args.data,
        "federation": args.federation,
        "transport": args.transport,
        "run": args.run,
    }
    training = {
        key: value
        for key, value in args.training.to_dict().items()
        if isinstance(value, str | int | float | bool | None)
    }
    return {**{name: asdict(group) for name, group in groups.items()}, "training": training}


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _known(cls: type[Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(cls)}
    return {name: value for name, value in plain.items() if name in names}
