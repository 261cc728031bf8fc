"""What a federated run leaves on disk as it goes.

rounds.jsonl, attempts.jsonl (those at a round that failed), adapter/, best/, checkpoints/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedtune.adapters import FULL, export_adapter
from fedtune.adapters.beside import Beside, put_beside
from fedtune.adapters.export import NOTHING
from fedtune.errors import RoundError
from fedtune.files import append_line, to_json, write_text
from fedtune.server import checkpoint
from fedtune.server.checkpoint import ServerState

__all__ = ["Personal", "RunStore"]


# State -> client -> its own parameters.
Personal = Callable[[ServerState], Mapping[str, dict[str, Tensor]]]


class RunStore:
    """Writes after every round, so that what is there is always the last good round.

    The adapter is written before the server state: a run killed in between repeats that round and
    writes the same adapter again.

    Args:
        personal: from a state to what each client keeps for itself, by client; where that is known.
        beside: what a full model needs beside its weights; a server of sites does not know it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        num_rounds: int,
        save_every_rounds: int,
        personal: Personal = lambda state: {},
        beside: Beside = NOTHING,
    ) -> None:
        self._directory = directory
        self._personal = personal
        self._beside = beside
        self._num_rounds = num_rounds
        self._save_every_rounds = save_every_rounds

    @property
    def _checkpoints(self) -> Path:
        return self._directory / "checkpoints"

    def load(self) -> ServerState | None:
        """The last durable state; rounds.jsonl is cut back to it."""
        state = checkpoint.load_latest(self._checkpoints)
        lines = [to_json(record) for record in state.history[1:]] if state else []
        write_text(self._directory / "rounds.jsonl", "".join(line + "\n" for line in lines))
        return state

    def first(self) -> ServerState:
        """The state before training, which every other arm starts from too."""
        state = checkpoint.load_latest(self._checkpoints / "start")
        if state is None:
            raise RoundError(
                f"expected the first state in {self._checkpoints / 'start'}, found none."
            )
        return state

    def on_round(self, state: ServerState, record: dict[str, Any]) -> None:
        """Keep the outcome of a finished round (or of round 0, before training)."""
        kind = "model" if state.manifest.peft_type == FULL else "adapter"
        self._export(self._directory / kind, state)
        if state.best.get("round") == state.round:
            self._export(self._directory / "best", state)
        if not state.round:
            checkpoint.save(self._checkpoints / "start", state)
        else:
            append_line(self._directory / "rounds.jsonl", to_json(record))
        if state.round % self._save_every_rounds == 0 or state.round == self._num_rounds:
            checkpoint.save(self._checkpoints, state)

    def on_attempt(self, failure: dict[str, Any]) -> None:
        """Keep who was refused and why: the round may never come about."""
        append_line(self._directory / "attempts.jsonl", to_json(failure))

    def save(self, state: ServerState) -> None:
        """Make this round durable, whatever `save_every_rounds` says."""
        checkpoint.save(self._checkpoints, state)

    def complete(self) -> None:
        """Put what a full model needs beside the weights that another process has written."""
        for name in ("model", "best"):
            if (self._directory / name / "config.json").is_file():
                put_beside(self._directory / name, self._beside)

    def _export(self, directory: Path, state: ServerState) -> None:
        """Write a PEFT (or full-model) checkpoint, with the adapters that are clients' own."""
        params, manifest = state.whole()
        own = {client: {**params, **tensors} for client, tensors in self._personal(state).items()}
        export_adapter(directory, params, state.static, manifest, clients=own, beside=self._beside)
