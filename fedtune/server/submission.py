"""What `fedtune submit` asks of the ServerApp: one JSON file in the output directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config import FederationArguments, TransportArguments
from fedtune.files import read_json, write_json

__all__ = ["FEDERATION", "STOP", "SUBMISSION", "Submission"]

SUBMISSION = "submission.json"
STOP = "stop"  # a file of this name in the output directory ends the run after the current round
FEDERATION = "federation.json"  # what the ServerApp says of itself, for `fedtune status`


@dataclass(frozen=True)
class Submission:
    """A federated run of a deployment.

    Attributes:
        run: id that sites know the run by; a resumed run keeps it.
        directory: where the ServerApp leaves its results.
        federation: rounds, budgets and method; its `num_clients` is not used.
        transport: how parameters are written for the wire.
        min_clients: sites that must have joined before the first round.
        join_timeout_s: how long to wait for them.
        sites_evaluate: whether each site scores the global model on rows of its own.
        resume: continue from the last durable round in `directory`.
        alone: whether the ServerApp is the one who writes there; False where the process that
            submitted it still does, and writes the report.
    """

    run: str
    directory: str
    federation: FederationArguments
    seed: int
    min_clients: int
    join_timeout_s: float
    init_adapter: str | None = None
    transport: TransportArguments = field(default_factory=TransportArguments)
    track: tuple[str, ...] = ()
    sites_evaluate: bool = True
    resume: bool = False
    alone: bool = True

    def write(self) -> Path:
        """Write it into its directory; returns the file."""
        path = Path(self.directory).absolute() / SUBMISSION
        write_json(path, asdict(self))
        return path

    @classmethod
    def read(cls, path: Path) -> Submission:
        """Inverse of `write`."""
        plain: dict[str, Any] = read_json(path)
        plain["federation"] = FederationArguments(**plain["federation"])
        plain["transport"] = TransportArguments(**plain.get("transport", {}))
        return cls(**{**plain, "track": tuple(plain["track"])})
