"""One round of one client: the Trainer stops at the round's end, and goes on in the next round.

The Trainer's own checkpoint carries optimizer, scheduler, RNG and data position; weights are left
out of it, because the global parameters replace them at the start of every round. The number of
steps of the whole run is known from the first round on, so the LR schedule is that of one long run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from fedtune.adapters import Manifest, load
from fedtune.adapters.alone import NEW_HEAD, base_alone
from fedtune.adapters.names import base_model
from fedtune.client.client_round import ClientRound, refuse_fp16, remembers
from fedtune.client.counter import BatchCounter
from fedtune.client.data_order import continued, fresh
from fedtune.client.instead import instead
from fedtune.client.lr_position import set_lr_position
from fedtune.client.memory import ClientMemory
from fedtune.client.per_token import PerToken
from fedtune.client.replies import LocalResult, Sent
from fedtune.client.score import Score
from fedtune.client.undisturbed import same_rng, silent, undisturbed
from fedtune.errors import ConfigError
from fedtune.server.rounds.check_update import finite_or_none
from fedtune.transport.messages import RoundTask

__all__ = [
    "MEMORY",
    "LocalResult",
    "derive_seed",
    "evaluate",
    "evaluate_base",
    "model_of",
    "quality_metrics",
    "steps_of",
    "train_round",
]

MEMORY = "memory"  # in a client's directory: what its method keeps
NO_QUALITY = (
    *("_runtime", "_per_second", "_time", "epoch", "_num_tokens", "_entropy"),
    *("_min_reward", "_max_reward"),  # of a batch, so of its size
)


def train_round(
    trainer: Trainer,
    task: RoundTask,
    sent: Sent,
    manifest: Manifest,
    *,
    client: str,
    state_dir: Path,
) -> LocalResult:
    """Train `task` from what the server has sent.

    `state_dir` holds what this client carries over rounds. With `task.carry` the round continues
    the state that the server last took an update from; otherwise it starts fresh, at the run's LR.
    What the method keeps at the client continues in both cases.
    """
    started = time.perf_counter()
    steps = steps_of(trainer, task.steps, task.epochs)
    first_step = (task.round - 1) * steps
    args = trainer.args
    args.max_steps = task.num_rounds * steps
    args.output_dir = str(state_dir)
    for torn in state_dir.glob("checkpoint-*"):  # a killed run left it half-written
        shutil.rmtree(torn, ignore_errors=True)
    if task.carry:
        checkpoint = _carried(state_dir, task.resume_round)
        args.ignore_data_skip = False
        data: AbstractContextManager[Callable[[Path], None] | None] = continued(trainer, checkpoint)
    else:
        seed = derive_seed(task.seed, client, task.round)
        checkpoint = _blank_checkpoint(trainer, state_dir, first_step)
        args.ignore_data_skip = True
        data = fresh(trainer, turn=seed)
        set_seed(seed)
    refuse_fp16(task, args)
    memory = ClientMemory(state_dir / MEMORY)
    kept = memory.read(task.resume_round if remembers(task) else 0)
    now = ClientRound(task, sent, kept, manifest)
    callback = _RoundCallback(now, first_step, steps, save=task.carry)
    counter = BatchCounter(trainer)
    try:
        with _without_weights(trainer), _callback(trainer, callback), counter, data as note_place:
            output = trainer.train(
                resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
            )
            if note_place is not None:
                note_place(_written(state_dir))
        outgoing = now.finish(model_of(trainer))
    finally:
        now.end()
    result = LocalResult(
        params=outgoing.params,
        control_change=outgoing.control_change,
        num_examples=counter.examples,
        num_tokens=counter.tokens,
        num_steps=callback.done,
        train_loss=float(output.training_loss),
        train_s=time.perf_counter() - started,
    )
    # The optimizer is on disk; dropping it keeps memory at one client's optimizer.
    trainer.optimizer = None
    trainer.lr_scheduler = None
    if outgoing.kept is not None:
        memory.write(task.round, outgoing.kept, (*task.keep_rounds, task.resume_round))
    if task.carry:
        _keep_state(state_dir, task)
    return result


def evaluate(trainer: Trainer, sent: Sent, manifest: Manifest) -> Score:
    """Score parameters that the server has sent on the trainer's held-out rows, on the live model.

    Losses are per label token. The RNG is put back, so that evaluating does not change the training
    that follows.
    """
    load(model_of(trainer), sent.params, manifest, base=sent.base)
    with same_rng(), PerToken(trainer) as scored:
        score = scored.score(trainer.evaluate())
    return replace(score, metrics=quality_metrics(score.metrics))


def evaluate_base(trainer: Trainer) -> float | None:
    """Held-out loss per token of the base model without its adapter, of a model as it was built.

    None where its classification head is new: no checkpoint has trained it.
    """
    model = model_of(trainer)
    if getattr(base_model(model), NEW_HEAD, False):
        return None
    accelerator = trainer.accelerator
    if not accelerator._models:  # as evaluating does, which would wrap the forward of the base
        accelerator.prepare_model(model, evaluation_mode=True)
    with (
        silent(trainer),
        undisturbed(trainer),
        base_alone(model),
        accelerator.autocast(),
        PerToken(trainer) as scored,
    ):
        score = scored.score(trainer.evaluate())
    return finite_or_none(score.metrics.get("eval_loss"))


def model_of(trainer: Trainer) -> nn.Module:
    """The live model, which a Trainer may in principle lack."""
    assert trainer.model is not None
    return trainer.model


def steps_of(trainer: Trainer, steps: int, epochs: float) -> int:
    """Optimizer steps of a round: `steps`, or where that is 0 those of `epochs` passes, rounded."""
    if steps:
        return steps
    with same_rng():
        batches = len(trainer.get_train_dataloader())
    accumulation = trainer.args.gradient_accumulation_steps
    return max(1, round(epochs * -(-batches // accumulation)))


def derive_seed(seed: int, client: str, round_number: int) -> int:
    """A seed of its own for every client and round, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    mixed = [*client.encode(), round_number]
    for value in mixed:
        draw = int(torch.randint(2**31 - 1, (), generator=generator))
        generator.manual_seed(draw ^ value)
    return int(torch.randint(2**31 - 1, (), generator=generator))


class _RoundCallback(TrainerCallback):
    """Begins the round when training starts; stops and saves at the round's end."""

    def __init__(self, now: ClientRound, first_step: int, steps: int, *, save: bool) -> None:
        self._now = now
        self._first_step, self._steps, self._save = first_step, steps, save
        self.done = 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._now.load(kwargs["model"])
        self._now.begin(kwargs["model"], kwargs["optimizer"])
        set_lr_position(kwargs["lr_scheduler"], self._first_step)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._now.apply()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.done += 1
        if self.done >= self._steps:
            control.should_training_stop = True
            control.should_save = self._save
            control.should_log = True
        return control


def _carried(state_dir: Path, resume_round: int) -> Path | None:
    if not resume_round:
        return None
    directory = _round_dir(state_dir, resume_round)
    if not directory.is_dir():
        raise ConfigError(
            f"client state: expected that of round {resume_round} in {directory}, found none; "
            "start again with --overwrite, or run with --client_state reset."
        )
    return directory


def _blank_checkpoint(trainer: Trainer, state_dir: Path, step: int) -> Path | None:
    """A checkpoint that holds the step alone: Trainer then builds optimizer and RNG afresh."""
    if not step:
        return None
    directory = state_dir / "blank"
    directory.mkdir(parents=True, exist_ok=True)
    state = TrainerState(global_step=step, train_batch_size=trainer.args.train_batch_size)
    state.compute_steps(trainer.args, trainer.args.max_steps)  # type: ignore[no-untyped-call]
    state.save_to_json(str(directory / TRAINER_STATE_NAME))
    return directory


def _written(state_dir: Path) -> Path:
    """What the Trainer has saved in this round."""
    (written,) = state_dir.glob("checkpoint-*")
    return written


def _keep_state(state_dir: Path, task: RoundTask) -> None:
    """Name the Trainer's checkpoint after the round; drop those that no rollback can need."""
    target = _round_dir(state_dir, task.round)
    shutil.rmtree(target, ignore_errors=True)
    _written(state_dir).rename(target)
    kept = {_round_dir(state_dir, number) for number in (*task.keep_rounds, task.resume_round)}
    for path in state_dir.glob("round-*"):
        if path not in kept | {target}:
            shutil.rmtree(path, ignore_errors=True)


def _round_dir(state_dir: Path, number: int) -> Path:
    return state_dir / f"round-{number:05d}"


def _without_weights(trainer: Trainer) -> AbstractContextManager[None]:
    """Checkpoints of the Trainer without weights and model card, neither written nor asked for."""
    return instead(
        trainer,
        save_model=_only_directory,
        create_model_card=_nothing,
        _load_from_checkpoint=_nothing,
    )


def _only_directory(output_dir: str, **_: Any) -> None:
    Path(output_dir).mkdir(parents=True, exist_ok=True)


def _nothing(*_: Any, **__: Any) -> None:
    return None


@contextmanager
def _callback(trainer: Trainer, callback: TrainerCallback) -> Iterator[None]:
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


def quality_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation says of the model, without timings, counts and trl's diagnostics."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not key.endswith(NO_QUALITY)
    }
