"""A Trainer's part in one federated run: one `train()` call, many rounds.

    step r*K ends -> send the update of round r -> answer the server until it asks for round r+1
                  -> load its parameters in place -> train K steps more

Nothing of the Trainer is built anew: optimizer, scheduler, RNG and data loader just go on, so one
client whose server returns its own update trains bit for bit like the plain Trainer.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from safetensors.torch import load, save
from torch import Tensor
from transformers import IntervalStrategy, Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput

from fedtune.adapters import Manifest, collect, collect_static, describe, load_static
from fedtune.adapters import load as load_params
from fedtune.adapters.base_terms import base_terms
from fedtune.adapters.sharded import is_sharded, local_part
from fedtune.client import replies
from fedtune.client.checkpoints import Mark, find_checkpoint, mark_checkpoint
from fedtune.client.client_round import ClientRound, completed, refuse_fp16, remembers
from fedtune.client.counter import BatchCounter, held_out
from fedtune.client.local import derive_seed, model_of, quality_metrics, set_lr_position
from fedtune.client.memory import ClientMemory, Kept
from fedtune.client.ranks import Ranks
from fedtune.client.replies import Sent
from fedtune.client.session import Request, Session
from fedtune.client.undisturbed import undisturbed
from fedtune.errors import ConfigError, FedtuneError, ManifestError, RoundError
from fedtune.files import write_bytes
from fedtune.relay.folder import SitePlan
from fedtune.relay.frames import Frame, decode, encode
from fedtune.transport import messages
from fedtune.transport.messages import EvaluateTask, RoundTask, arrays_of

__all__ = ["Options", "Participant"]

log = logging.getLogger(__name__)

STATIC = "static.safetensors"  # in the run's folder
FAILED = "failed"  # how the reason of a run that has failed begins


@dataclass(frozen=True)
class Options:
    """What a script says of its own rounds.

    Raises:
        ConfigError: both budgets, or one that is not positive.
    """

    steps_per_round: int | None = None
    epochs_per_round: float | None = None
    reset_optimizer: bool = False
    restart_lr: bool = False

    def __post_init__(self) -> None:
        steps, epochs = self.steps_per_round, self.epochs_per_round
        if steps is not None and epochs is not None:
            raise ConfigError(
                f"patch: expected steps_per_round or epochs_per_round, received both ({steps} and "
                f"{epochs}). Leave one out."
            )
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ConfigError(
                f"steps_per_round: expected a whole number of at least 1, received {steps!r}. "
                "Give the optimizer steps of a round."
            )
        if epochs is not None and not 0 < epochs < float("inf"):
            raise ConfigError(
                f"epochs_per_round: expected a number above 0, received {epochs!r}. "
                "Give the passes over the rows in a round."
            )


class Participant:
    """What the hooks of a patched Trainer do while its run goes on.

    Args:
        session: of rank 0; None on the others.
        steps: optimizer steps per round.
    """

    def __init__(
        self,
        trainer: Trainer,
        session: Session | None,
        plan: SitePlan,
        steps: int,
        options: Options,
        ranks: Ranks,
        folder: Path,
    ) -> None:
        self.trainer, self.session, self.plan, self.steps = trainer, session, plan, steps
        self._options, self._ranks, self._folder = options, ranks, folder
        self._counter = BatchCounter(trainer)
        self._manifest: Manifest | None = None
        self._epochs = 0
        self._request: Request | None = None  # the last one heard, on rank 0
        self._task: RoundTask | None = None  # the round that is trained
        self._task_request: Request | None = None
        self._now: ClientRound | None = None
        self._done = 0  # steps of it
        self._started = 0.0
        self._scored: Frame | None = None  # waits for the Trainer's own evaluation
        self._scores: dict[str, float] = {}
        self._score_parts = 0
        self._final: Sent | None = None
        self._reason = ""

    # The whole run.

    def train(
        self, train: Callable[..., TrainOutput], resume: str | bool | None, *args: Any, **kw: Any
    ) -> TrainOutput:
        """Run the Trainer's own `train` as one federated run.

        Raises:
            RoundError: the server said that the run has failed, or nothing for too long.
            ConfigError: the run is over already.
        """
        if self._reason:
            raise ConfigError(
                f"run {self.plan.run}: expected one train() per run, received another one after "
                f"the run was over ({self._reason}). Call fedtune.unpatch(trainer) first."
            )
        try:
            # Before the Trainer wraps the model: its tensors may then be spread over processes.
            self._manifest = self._ranks.together(lambda: describe(model_of(self.trainer)))
            self._load_saved_static()
            ours = self._find_checkpoint() if resume in (None, False) else None
            with self._counter, self._endless(), self._schedule(), _weightless(self.trainer, ours):
                output = train(ours or resume, *args, **kw)
        except BaseException as error:
            self.close(f"training failed: {type(error).__name__}: {error}")
            raise
        if self._reason.startswith(FAILED):
            raise RoundError(
                f"run {self.plan.run}: {self._reason.rstrip('.')}. The last good global is loaded."
            )
        return output

    def close(self, reason: str = "the site's trainer has ended") -> None:
        """Free the session; what the server waits for is refused with `reason`."""
        if self.session is not None:
            self.session.close(reason)

    def _find_checkpoint(self) -> str | None:
        found = None
        if self._ranks.first:
            found = find_checkpoint(Path(str(self.trainer.args.output_dir)), self._mark())
        path = self._ranks.share(str(found or "").encode()).decode()
        if path:
            self._say(f"goes on from {path}")
        return path or None

    def _mark(self) -> Mark:
        plan = self.plan
        return Mark(plan.run, plan.client, plan.num_rounds, self.steps)

    @contextmanager
    def _endless(self) -> Iterator[None]:
        """Epochs without end: the run's rounds end the training, even when some are repeated."""
        values = self.trainer.set_initial_training_values

        def endless(*args: Any, **kw: Any) -> tuple[Any, ...]:
            self._epochs, *others = values(*args, **kw)
            return sys.maxsize, *others

        with _override(self.trainer, set_initial_training_values=endless):
            yield

    @contextmanager
    def _schedule(self) -> Iterator[None]:
        """The LR schedule spans the run, or with `restart_lr` one round."""
        create = self.trainer.create_scheduler

        def of_one_round(num_training_steps: int, *args: Any, **kw: Any) -> Any:
            return create(self.steps, *args, **kw)

        overrides = {"create_scheduler": of_one_round} if self._options.restart_lr else {}
        with _override(self.trainer, **overrides):
            yield

    # Hooks, in the order of the Trainer's loop.

    def on_train_begin(self, state: TrainerState, control: TrainerControl) -> None:
        """Meet the server and wait for the first round."""
        state.num_train_epochs = self._epochs
        if state.max_steps != self.plan.num_rounds * self.steps:
            raise ConfigError(
                f"max_steps: expected {self.plan.num_rounds} rounds x {self.steps} steps as "
                f"planned by fedtune.patch, received {state.max_steps}. Leave it as it is."
            )
        self._converse(state, control, own_evaluation=bool(self.trainer.args.eval_on_start))
        self._take_place(state)

    def on_step_begin(self, state: TrainerState, control: TrainerControl) -> None:
        """Begin a round that was asked for: at its place in the run, whatever was before."""
        if self._scored is not None:  # the Trainer did not evaluate after all
            self._score()
            self._converse(state, control)
        if self._task is None or self._started:
            return
        self._started = time.perf_counter()
        self._counter.reset()
        self._take_place(state)
        if self._options.restart_lr:
            self.trainer.lr_scheduler.last_epoch = -1  # type: ignore[union-attr]
            self.trainer.lr_scheduler.step()  # type: ignore[union-attr]
        assert self._now is not None
        self._now.begin(model_of(self.trainer), self.trainer.optimizer)
        spoiled = self._optimizer_is_spoiled()
        if spoiled:
            self._say("the optimizer's state is not finite; it begins anew", warn=True)
        if self._options.reset_optimizer or not self._task.carry or spoiled:
            self.trainer.optimizer.state.clear()  # type: ignore[union-attr]
        if not self._task.carry:
            set_seed(derive_seed(self._task.seed, self.plan.client, self._task.round))

    def on_pre_optimizer_step(self) -> None:
        """Correct the gradients, where the method does."""
        if self._now is not None and self._started:
            self._now.apply()

    def on_step_end(self, state: TrainerState, control: TrainerControl) -> None:
        """At the end of a round: send it, and hear what comes next."""
        if self._final is not None:  # the end was known before this step: it does not count
            self._stop(control)
            control.should_evaluate = control.should_save = False
            return
        self._done += 1
        if self._done < self.steps:
            return
        left = control.should_training_stop and state.global_step < state.max_steps
        self._send_update()
        if not left:  # left: somebody else's callback stops the training
            self._converse(state, control, own_evaluation=self._evaluates_now(state, control))

    def on_evaluate(
        self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]
    ) -> None:
        """The Trainer's own evaluation of the global parameters is the server's as well."""
        if self._scored is None:
            return
        self._scores.update(metrics)
        self._score_parts += 1
        sets = self.trainer.eval_dataset
        if self._score_parts < (len(sets) if isinstance(sets, dict) else 1):
            return
        stopped = control.should_training_stop and state.global_step < state.max_steps
        self._score(self._scores)
        if not stopped:
            self._converse(state, control)

    def on_save(self, state: TrainerState) -> None:
        """Mark the checkpoint as one of this run."""
        if state.is_world_process_zero:
            directory = Path(str(self.trainer.args.output_dir)) / f"checkpoint-{state.global_step}"
            number = self._task.round if self._task else 0
            if directory.is_dir():
                mark_checkpoint(
                    directory, replace(self._mark(), round=number, step=state.global_step)
                )

    def on_train_end(self, state: TrainerState, control: TrainerControl) -> None:
        """End with the server's parameters. Whoever stopped early trains no more, but waits."""
        if self._final is None:
            if self._scored is not None:
                self._score()
            self._say(f"training has ended at step {state.global_step}, the run has not", warn=True)
            if self._done:
                self._send_update()
            elif self._task_request is not None:
                self._task_request.fail(self._no_more(state))
            self._task = None
            self._converse(state, control, may_train=False)
        assert self._final is not None
        self._end_with(self._final)
        if self.session is not None:
            self.session.say("over", reason=self._reason)
            self.session.end(f"the run is over at this site ({self._reason})")

    # The conversation.

    def _converse(
        self,
        state: TrainerState,
        control: TrainerControl,
        *,
        own_evaluation: bool = False,
        may_train: bool = True,
    ) -> None:
        """Answer the server until there is a round to train, or the run is over.

        Also returns when the Trainer is about to evaluate of its own accord what the server wants
        scored; `on_evaluate` then goes on.
        """
        while True:
            frame = self._hear()
            try:
                answer = self._ranks.together(partial(self._answer, frame, state, may_train))
            except FedtuneError as error:
                self._fail(str(error))
                if frame.kind == messages.SETUP:  # it will not fit later either
                    raise
                log.error("%s: %s", frame.kind, error)
                continue
            if answer is not None:
                self._reply(answer)
            elif frame.kind == messages.EVALUATE:
                self._scored, self._scores, self._score_parts = frame, {}, 0
                if own_evaluation:
                    return
                self._score()
            elif frame.kind == messages.TRAIN:
                # The Trainer may have thought that the last step was the last of all.
                control.should_training_stop = False
                self._tell("training")
                return
            elif frame.kind == messages.FINISH:
                self._stop(control)
                self._reply(replies.finished(self.plan.client))
                return

    def _answer(self, frame: Frame, state: TrainerState, may_train: bool) -> RecordDict | None:
        """The reply, or None when more has to be done for it."""
        content = frame.content
        match frame.kind:
            case messages.PLAN:
                return self._planned()
            case messages.INITIAL:
                model = model_of(self.trainer)
                return replies.initial(collect(model), collect_static(model), self._built)
            case messages.SETUP:
                return self._set_up(content)
            case messages.EVALUATE:
                self._refer(replies.round_of(content), content)
                self._show(content)
                return None
            case messages.TRAIN:
                if not may_train:
                    raise RoundError(self._no_more(state))
                self._begin(content)
                return None
            case messages.FINISH:
                self._final = self._last(content)
                self._reason = str(content.config_records["config"].get("reason", "done"))
                return None
        raise RoundError(
            f"{self.plan.client}: expected a known request, received {frame.kind!r}. Use the same "
            "fedtune on both sides."
        )

    def _hear(self) -> Frame:
        """The next request, the same on every rank. Raises RoundError after a long silence."""
        self._request, data, problem = None, b"", None
        if self.session is not None:
            self._tell("waiting")
            try:
                self._request = self.session.next(self.plan.idle_timeout_s, self._ranks.beat)
                if self._ranks.count == 1:
                    return Frame(self._request.kind, self._request.content)
                data = encode(self._request.kind, self._request.content)
            except FedtuneError as error:
                problem = error
                data = encode("error", error=str(error))
        while not (heard := self._ranks.share(data)):
            pass  # rank 0 is still there
        frame = decode(heard)
        if frame.error is not None:
            raise problem or RoundError(frame.error)
        return frame

    def _reply(self, content: RecordDict) -> None:
        if self._request is not None:
            self._request.reply(content)

    def _fail(self, reason: str) -> None:
        if self._request is not None:
            self._request.fail(reason)

    # What is asked.

    @property
    def _built(self) -> Manifest:
        assert self._manifest is not None
        return self._manifest

    def _planned(self) -> RecordDict:
        rows: Any = self.trainer.train_dataset
        return replies.planned(
            self.plan.client,
            evaluates=self.trainer.eval_dataset is not None,
            manifest=self._built,
            rows=len(rows) if hasattr(rows, "__len__") else 0,
        )

    def _set_up(self, content: RecordDict) -> RecordDict:
        self._manifest = replies.agree(replies.manifest_of(content), self._built)
        static = arrays_of(content)
        if static:
            load_static(model_of(self.trainer), static, self._built)
            if self._ranks.first:
                write_bytes(self._folder / STATIC, save(static))
        return replies.set_up(self.plan.client)

    def _load_saved_static(self) -> None:
        """A script that is started again is not set up again."""
        static = self._saved(self._folder / STATIC)
        if static:
            self._manifest = self._built.frozen(static)
            load_static(model_of(self.trainer), static, self._built)

    def _begin(self, content: RecordDict) -> None:
        task = RoundTask.of(content)
        if task.manifest != self._built.hash:
            raise ManifestError(
                f"{self.plan.client}: expected a round for adapter {self._built.hash[:12]}, "
                f"received one for {task.manifest[:12]}. Send setup again."
            )
        if not 1 <= task.round <= self.plan.num_rounds:
            raise RoundError(
                f"{self.plan.client}: expected a round from 1 to {self.plan.num_rounds} as "
                f"planned, received round {task.round}. Submit a new run."
            )
        refuse_fp16(task, self.trainer.args)
        self._refer(task.round - 1, content)
        now = ClientRound(task, Sent.of(content), self._recall(task), self._built)
        now.load(model_of(self.trainer))
        self._now, self._task, self._task_request = now, task, self._request
        self._done, self._started = 0, 0.0

    def _send_update(self) -> None:
        task = self._task
        assert task is not None
        model = model_of(self.trainer)
        assert self._now is not None
        outgoing = self._now.finish(model, collects=self._ranks.first or is_sharded(model))
        self._now = None
        if outgoing.kept is not None and self._ranks.first:
            still_needed = (*task.keep_rounds, task.resume_round)
            self._memory.write(task.round, outgoing.kept, still_needed)
        counter, ranks = self._counter, self._ranks
        examples, tokens, loss = ranks.total([counter.examples, counter.tokens, counter.loss])
        result = replies.LocalResult(
            params=outgoing.params,
            control_change=outgoing.control_change,
            num_examples=int(examples),
            num_tokens=int(tokens),
            num_steps=self._done,
            train_loss=loss / ranks.count / self._done,
            train_s=time.perf_counter() - self._started,
        )
        if self._task_request is not None:
            self._task_request.reply(replies.trained(self.plan.client, task, result))
        self._task_request, self._done = None, 0

    def _score(self, metrics: dict[str, float] | None = None) -> None:
        """Answer the evaluation that is asked for, with `metrics` or from an evaluation of its own.

        The latter leaves no trace in the training but its entry in the log.
        """
        frame = self._scored
        assert frame is not None
        self._scored = None
        self._tell("evaluating")
        if metrics is None:
            with undisturbed(self.trainer):
                metrics = self.trainer.evaluate()
        rows = held_out(self.trainer)
        content = replies.evaluated(
            self.plan.client,
            replies.round_of(frame.content),
            quality_metrics(metrics),
            num_examples=rows.examples,
            num_tokens=rows.tokens,
        )
        self._reply(content)

    def _evaluates_now(self, state: TrainerState, control: TrainerControl) -> bool:
        """Whether the Trainer evaluates after this step, before the next one."""
        args = self.trainer.args
        if control.should_evaluate:
            return True
        return (
            args.eval_strategy == IntervalStrategy.EPOCH
            and float(state.epoch or 0).is_integer()
            and args.eval_delay <= (state.epoch or 0)
        )

    def _optimizer_is_spoiled(self) -> bool:
        """Whether NaN or Inf is left in it, on any process, by a gradient that was none.

        Good parameters from the server would not cure that: the next step spoils them again.
        """
        states = self.trainer.optimizer.state.values()  # type: ignore[union-attr]
        tensors = [value for state in states for value in state.values()]
        bad = any(
            isinstance(value, Tensor)
            and value.is_floating_point()
            and not bool(local_part(value).isfinite().all())
            for value in tensors
        )
        if is_sharded(model_of(self.trainer)):  # else every process has the same state
            bad = bool(self._ranks.total([float(bad)])[0])
        return bad

    # Parameters and places.

    def _show(self, content: RecordDict) -> None:
        """Load what is to be scored: the global parameters, with this client's own."""
        task, sent = EvaluateTask.of(content), Sent.of(content)
        params = completed(sent.params, self._recall(task), task.personal)
        load_params(model_of(self.trainer), params, self._built, base=sent.base)

    def _last(self, content: RecordDict) -> Sent:
        """What the run ends with: what is not sent stays as it is."""
        sent, model = Sent.of(content), model_of(self.trainer)
        live = {n: tensor for n, tensor in collect(model).items() if n in self._built.entries}
        return Sent({**live, **sent.params}, sent.base if sent.params else base_terms(model))

    def _end_with(self, last: Sent) -> None:
        load_params(model_of(self.trainer), last.params, self._built, base=last.base)

    def _recall(self, task: RoundTask | EvaluateTask) -> Kept:
        """What this client kept from its last round that counted, on every rank."""
        number = task.resume_round if remembers(task) else 0
        tensors = self._saved(self._memory.file(number)) if number else {}
        if number and not tensors:
            raise self._memory.lost(number)
        return Kept.of(tensors)

    @property
    def _memory(self) -> ClientMemory:
        """Beside the checkpoints, as `_reference`."""
        name = f"fedtune_memory-{self.plan.run}-{self.plan.client}"
        return ClientMemory(Path(str(self.trainer.args.output_dir)) / name)

    def _refer(self, round_number: int, content: RecordDict) -> None:
        """Give DPOTrainer the run's first global as adapter `ref`, which it compares with."""
        model = model_of(self.trainer)
        if "ref" not in getattr(model, "peft_config", {}):
            return
        if round_number == 0:
            params = arrays_of(content)
            if self._ranks.first:
                self._reference.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self._reference, save(params))
        else:
            params = self._saved(self._reference)
        if not params:
            raise RoundError(
                f"{self.plan.client}: expected the run's first parameters for the adapter `ref`, "
                f"received those of round {round_number}. With DPO all sites join before round 1, "
                "or give the trainer peft_config= instead of an adapter."
            )
        load_params(model, params, self._built, adapter_name="ref")

    @property
    def _reference(self) -> Path:
        """Beside the checkpoints: a run that was stopped goes on in another folder."""
        name = f"fedtune_reference-{self.plan.run}.safetensors"
        return Path(str(self.trainer.args.output_dir)) / name

    def _saved(self, file: Path) -> dict[str, Tensor]:
        """Tensors kept in a file, which only rank 0 may have; empty for none."""
        data = self._ranks.share(file.read_bytes() if self._ranks.first and file.is_file() else b"")
        return load(data) if data else {}

    def _take_place(self, state: TrainerState) -> None:
        """Go on where the run is: a site that joins late or missed rounds is elsewhere."""
        if self._task is None:
            return
        step = (self._task.round - 1) * self.steps
        moved = step - state.global_step
        if not moved:
            return
        self._say(f"goes from step {state.global_step} to {step}, where the run is")
        state.global_step = step
        # From these the Trainer works out over how many steps a loss is a mean.
        for name in ("_globalstep_last_logged", "_initial_global_step"):
            vars(self.trainer)[name] += moved
        if not self._options.restart_lr:
            set_lr_position(self.trainer.lr_scheduler, step)  # type: ignore[arg-type]

    def _stop(self, control: TrainerControl) -> None:
        assert self._final is not None
        self._end_with(self._final)
        control.should_training_stop = True

    def _no_more(self, state: TrainerState) -> str:
        return (
            f"{self.plan.client}: training has ended at step {state.global_step} of "
            f"{state.max_steps}, so this site trains no further round. See its own log for why."
        )

    def _say(self, what: str, *, warn: bool = False) -> None:
        if self._ranks.first:
            log.log(logging.WARNING if warn else logging.INFO, "%s: %s", self.plan.client, what)

    def _tell(self, state: str) -> None:
        if self.session is not None:
            number = self._task.round if self._task else 0
            self.session.say(state, round=number, step=self.trainer.state.global_step)


@contextmanager
def _override(trainer: Trainer, **methods: Callable[..., Any]) -> Iterator[None]:
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(trainer).pop(name, None)


@contextmanager
def _weightless(trainer: Trainer, checkpoint: str | None) -> Iterator[None]:
    """Leave the weights of our own checkpoint alone: PEFT's files do not hold every method's."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    overrides = {"_load_from_checkpoint": nothing} if checkpoint else {}
    with _override(trainer, **overrides):
        yield
