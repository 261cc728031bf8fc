"""Each client's own held-out rows: how an arm's last model does there is what a site gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from fedtune.client.local import evaluate
from fedtune.client.replies import Sent
from fedtune.client.undisturbed import same_rng, silent
from fedtune.client.worker import Worker
from fedtune.server.checkpoint import ServerState
from fedtune.server.rounds.check_update import finite_or_none
from fedtune.strategies.lora.manifests import ranks_of
from fedtune.strategies.lora.ranks import resize

__all__ = ["OwnRows"]


class OwnRows:
    """Scores parameters on the rows of one client after the other.

    Its Trainers are built by the recipe, one per client when it is first asked for, and hold the
    held-out rows only.

    Args:
        worker: the live model.
        rows: held-out rows by client.
        directory: for what Trainers write.
    """

    def __init__(self, worker: Worker, rows: Mapping[str, Dataset], directory: Path) -> None:
        self._worker = worker.fork(work_dir=directory)
        self._worker.args.training.report_to = []
        self._rows = rows
        self._trainers: dict[str, Trainer] = {}

    @classmethod
    @contextmanager
    def of(cls, worker: Worker, rows: Mapping[str, Dataset] | None) -> Iterator[OwnRows]:
        """Scores nothing without `rows`."""
        with TemporaryDirectory() as scratch:
            yield cls(worker, rows or {}, Path(scratch))

    def score(
        self, client: str, params: dict[str, Tensor], base: dict[str, Tensor] | None = None
    ) -> float | None:
        """Loss per token on a client's own rows; None without rows, or where it is no number.

        `params` are those of the whole live adapter; `base`: what has been added to the base.
        """
        if not len(self._rows.get(client, ())):
            return None
        with same_rng():
            trainer = self._trainer(client)
            with silent(trainer):
                score = evaluate(trainer, Sent(params, base or {}), self._worker.manifest)
        return finite_or_none(score.metrics.get("eval_loss"))

    def scores(self, params: dict[str, Tensor]) -> dict[str, float | None]:
        """The same parameters on every client's rows."""
        return {client: self.score(client, params) for client in self._rows}

    def final(
        self, state: ServerState, personal: Mapping[str, Mapping[str, Tensor]], key: str
    ) -> dict[str, float | None]:
        """The last global on every client's rows, as the rounds score it.

        Args:
            personal: what each client keeps for itself, where a method has it keep something.
            key: of the random start of ranks beyond the global ones.
        """
        manifest = self._worker.manifest
        whole = resize({**state.static, **state.params}, ranks_of(manifest), key=key)
        params = {name: whole[name] for name in manifest.entries}
        base = state.base.sent(state.params) if state.base.terms else {}
        return {
            client: self.score(client, {**params, **personal.get(client, {})}, base)
            for client in self._rows
        }

    def _trainer(self, client: str) -> Trainer:
        if client not in self._trainers:
            rows = self._rows[client]
            self._trainers[client] = self._worker.new_trainer(rows, rows, client)
        return self._trainers[client]
