"""A plain Trainer run, evaluated at marks: what every arm but the federated one is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from fedtune.adapters import Manifest, collect, load
from fedtune.client.counter import BatchCounter
from fedtune.client.local import evaluate, model_of, quality_metrics
from fedtune.client.per_token import PerToken
from fedtune.client.replies import Sent
from fedtune.client.undisturbed import get_rng, set_rng
from fedtune.results.round_record import RoundRecord
from fedtune.server.rounds.check_update import finite_or_none

__all__ = ["PlainRun", "run_plain"]


@dataclass
class PlainRun:
    """History by mark, the trained parameters, and the Trainer's own log.

    Attributes:
        last_rows: rows of the last optimizer step.
    """

    history: list[RoundRecord] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    last_rows: int = 0


def run_plain(
    trainer: Trainer,
    params: dict[str, Tensor],
    manifest: Manifest,
    *,
    max_steps: int,
    marks: Sequence[int],
    mark_by: Literal["samples", "steps"],
    on_step: Callable[[int], None] | None = None,
) -> PlainRun:
    """Train `trainer` from `params` and evaluate at the first step that reaches each mark.

    Args:
        max_steps: length of the run, and so of the LR schedule.
        marks: increasing counts of samples or optimizer steps; training ends at the last one, or at
            `max_steps`, where all that were not reached are read. Empty: no evaluation.
        on_step: called with the number of finished steps.
    """
    trainer.args.max_steps = max_steps
    run = PlainRun()
    counter = BatchCounter(trainer)
    if marks:
        metrics = evaluate(trainer, Sent(params), manifest).metrics
        run.history.append(_record(0, metrics, counter, None, 0.0))
    with counter, PerToken(trainer) as scored:
        callback = _Marks(params, manifest, marks, mark_by, counter, scored, run, on_step)
        trainer.add_callback(callback)
        trainer.train()
    trainer.remove_callback(callback)
    run.params = collect(model_of(trainer))
    run.log_history = list(trainer.state.log_history)
    trainer.optimizer = None
    trainer.lr_scheduler = None
    return run


class _Marks(TrainerCallback):
    def __init__(
        self,
        params: dict[str, Tensor],
        manifest: Manifest,
        marks: Sequence[int],
        mark_by: str,
        counter: BatchCounter,
        scored: PerToken,
        run: PlainRun,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self._params, self._manifest = params, manifest
        self._marks, self._mark_by = list(marks), mark_by
        self._counter, self._scored = counter, scored
        self._run, self._on_step = run, on_step
        self._rng: dict[str, Any] | None = None
        self._found: dict[str, float] = {}
        self._rows = 0
        self._started = 0.0
        self._read_loss, self._read_step = 0.0, 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        load(kwargs["model"], self._params, self._manifest)
        self._started = time.perf_counter()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._on_step is not None:
            self._on_step(state.global_step)
        self._run.last_rows = self._counter.examples - self._rows
        self._rows = self._counter.examples
        if self._due(state):
            control.should_evaluate = True
            control.should_log = True
            # An evaluation draws from the global RNG; training must not notice.
            self._rng = get_rng()
            control.should_training_stop = len(self._due(state)) == len(self._marks)
        return control

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._rng is None or not self._marks:
            return
        self._found.update(metrics or {})
        if not all(f"{prefix}_runtime" in self._found for prefix in self._scored.prefixes):
            return  # one of several held-out sets
        found, self._found = self._scored.score(self._found).metrics, {}
        set_rng(self._rng)
        self._rng = None
        seconds, self._started = time.perf_counter() - self._started, time.perf_counter()
        # Not from the log, whose values are means over spans of unequal length.
        steps, loss = state.global_step - self._read_step, self._counter.loss
        train_loss = (loss - self._read_loss) / steps
        self._read_loss, self._read_step = loss, state.global_step
        for _ in self._due(state):
            self._marks.pop(0)
            number = len(self._run.history)
            self._run.history.append(_record(number, found, self._counter, train_loss, seconds))

    def _due(self, state: TrainerState) -> list[int]:
        """Marks that are to be read after this step."""
        if state.global_step >= state.max_steps:
            return list(self._marks)
        done = self._counter.examples if self._mark_by == "samples" else state.global_step
        return [mark for mark in self._marks if mark <= done]


def _record(
    number: int,
    metrics: dict[str, float],
    counter: BatchCounter,
    train_loss: float | None,
    seconds: float,
) -> RoundRecord:
    quality = quality_metrics(metrics)
    return RoundRecord(
        round=number,
        eval_loss=finite_or_none(quality.pop("eval_loss")),
        eval_metrics={name: finite_or_none(value) for name, value in quality.items()},
        train_loss=finite_or_none(train_loss),
        samples=counter.examples,
        tokens=counter.tokens,
        wall_s=round(seconds, 4),
    )
