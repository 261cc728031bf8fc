"""The evaluation that the server waits for: the Trainer's own, or one beside its training."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import RecordDict
from transformers import IntervalStrategy, Trainer, TrainerControl, TrainerState

from fedtune.client import replies
from fedtune.client.counter import held_out
from fedtune.client.local import quality_metrics
from fedtune.client.undisturbed import undisturbed

__all__ = ["Scoring", "evaluates_now"]


class Scoring:
    """At most one evaluation is waited for at a time."""

    def __init__(self, trainer: Trainer, client: str) -> None:
        self._trainer, self._client = trainer, client
        self._request: RecordDict | None = None
        self._found: dict[str, float] = {}
        self._parts = 0

    @property
    def waits(self) -> bool:
        """Whether there is one."""
        return self._request is not None

    def ask(self, request: RecordDict) -> None:
        """The parameters to score are in the model."""
        self._request, self._found, self._parts = request, {}, 0

    def take(self, metrics: Mapping[str, float]) -> bool:
        """The Trainer has evaluated a held-out set; whether that was the last of them."""
        self._found.update(metrics)
        self._parts += 1
        return self._is_whole

    @property
    def _is_whole(self) -> bool:
        sets = self._trainer.eval_dataset
        return self._parts >= (len(sets) if isinstance(sets, dict) else 1)

    def answer(self) -> RecordDict:
        """The reply: what was taken, else an evaluation that leaves a trace in the log only."""
        assert self._request is not None
        number = replies.round_of(self._request)
        self._request = None
        if not self._is_whole:
            with undisturbed(self._trainer):
                self._found = self._trainer.evaluate()
        rows = held_out(self._trainer)
        return replies.evaluated(
            self._client,
            number,
            quality_metrics(self._found),
            num_examples=rows.examples,
            num_tokens=rows.tokens,
        )


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
