"""The evaluation that the server waits for: the Trainer's own, or one beside its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import RecordDict
from transformers import IntervalStrategy, Trainer, TrainerControl, TrainerState

from fedtune.client import replies
from fedtune.client.local import quality_metrics
from fedtune.client.per_token import PerToken
from fedtune.client.undisturbed import undisturbed

__all__ = ["Scoring", "evaluates_now"]


class Scoring:
    """At most one evaluation is waited for at a time.

    Args:
        scored: entered around the trainer's evaluations, so that their losses are per token.
    """

    def __init__(self, trainer: Trainer, client: str, scored: PerToken) -> None:
        self._trainer, self._client, self._scored = trainer, client, scored
        self._request: RecordDict | None = None
        self._found: dict[str, float] = {}
        self._missing: set[str] = set()

    @property
    def waits(self) -> bool:
        """Whether there is one."""
        return self._request is not None

    def ask(self, request: RecordDict) -> None:
        """The parameters to score are in the model."""
        self._request, self._found = request, {}
        self._missing = set(self._scored.prefixes)

    def take(self, metrics: Mapping[str, float]) -> bool:
        """The Trainer has evaluated some rows; whether all held-out sets are scored by now."""
        mine = {prefix for prefix in self._missing if f"{prefix}_runtime" in metrics}
        if not mine:  # a callback's own, of other rows
            return False
        self._found.update(metrics)
        self._missing -= mine
        return not self._missing

    def answer(self) -> RecordDict:
        """The reply: what was taken, else an evaluation that leaves a trace in the log only."""
        assert self._request is not None
        number = replies.round_of(self._request)
        self._request = None
        if self._missing:
            with undisturbed(self._trainer):
                self._found = self._trainer.evaluate()
        score = self._scored.score(self._found)
        score = replace(score, metrics=quality_metrics(score.metrics))
        return replies.evaluated(self._client, number, score)


def evaluates_now(trainer: Trainer, state: TrainerState, control: TrainerControl) -> bool:
    """Whether the Trainer evaluates after this step, before the next one."""
    args = trainer.args
    if control.should_evaluate:
        return True
    return (
        args.eval_strategy == IntervalStrategy.EPOCH
        and float(state.epoch or 0).is_integer()
        and args.eval_delay <= (state.epoch or 0)
    )
