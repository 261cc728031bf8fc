"""A Trainer's part in one federated run: one `train()` call, many rounds.

    step r*K ends -> send the update of round r -> answer the server until it asks for round r+1
                  -> load its parameters in place -> train K steps more

Nothing of the Trainer is built anew: optimizer, scheduler, RNG and data loader just go on, so one
client whose server returns its own update trains bit for bit like the plain Trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from fedtune.client import replies
from fedtune.client.checkpoints import Mark, another, find_checkpoint, mark_checkpoint
from fedtune.client.conversation import Conversation
from fedtune.client.failing import ended_by, told
from fedtune.client.live_round import LiveRound
from fedtune.client.live_trainer import endless, schedule, weightless
from fedtune.client.options import Options
from fedtune.client.per_token import PerToken
from fedtune.client.ranks import Ranks
from fedtune.client.refusal import note_refusal
from fedtune.client.replies import Sent
from fedtune.client.scoring import Scoring, evaluates_now
from fedtune.client.session import Session
from fedtune.client.site_model import SiteModel
from fedtune.errors import ConfigError, FedtuneError, RoundError
from fedtune.relay.folder import SitePlan
from fedtune.relay.frames import Frame
from fedtune.transport import messages
from fedtune.transport.records import config_of

__all__ = ["Participant"]

log = logging.getLogger(__name__)

FAILED = "failed"  # how the reason of a run that has failed begins


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
        self.trainer, self.plan, self.steps = trainer, plan, steps
        self._options, self._ranks, self._folder = options, ranks, folder
        self._run_folder = None if session is None else session.folder
        self._talk = Conversation(session, ranks, plan)
        self._round = LiveRound(trainer, plan, steps, options, self._talk)
        self._scored = PerToken(trainer)
        self._scoring = Scoring(trainer, plan.client, self._scored)
        self._at_site: SiteModel | None = None
        self._epochs = 0
        self._final: Sent | None = None
        self._sent = False  # whether the server had parameters to end with
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
            self._at_site = SiteModel(
                self.trainer, self.plan, self.steps, self._ranks, self._folder
            )
            ours = self._find_checkpoint()
            if words := another(resume, ours, self.trainer.args.output_dir):
                log.warning("fedtune: run %s: %s", self.plan.run, words)
            span = self.steps if self._options.restart_lr else None
            with (
                self._round.counter,
                self._scored,
                endless(self.trainer, partial(setattr, self, "_epochs")),
                schedule(self.trainer, span),
                weightless(self.trainer, ours),
            ):
                output = train(ours, *args, **kw)
        except BaseException as error:
            if not self._round.number:  # it has trained none
                note_refusal(self._run_folder, error)
            self._round.abort()
            self.close(ended_by(error))
            raise
        if self._reason.startswith(FAILED):
            ended = f"run {self.plan.run}: {self._reason.rstrip('.')}."
            raise RoundError(f"{ended} The last good global is loaded." if self._sent else ended)
        return output

    def close(self, reason: str = "the site's trainer has ended") -> None:
        """Free the session; what the server waits for is refused with `reason`."""
        self._talk.close(reason)

    def _find_checkpoint(self) -> str | None:
        found = None
        if self._ranks.first:
            found = find_checkpoint(Path(str(self.trainer.args.output_dir)), self._mark())
        path = self._ranks.share(str(found or "").encode()).decode()
        if path:
            self._talk.note(f"goes on from {path}")
        return path or None

    def _mark(self) -> Mark:
        plan = self.plan
        return Mark(plan.run, plan.client, plan.num_rounds, self.steps)

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
        self._round.take_place(state)

    def on_step_begin(self, state: TrainerState, control: TrainerControl) -> None:
        """Begin a round that was asked for: at its place in the run, whatever was before."""
        if self._scoring.waits:  # the Trainer did not evaluate after all
            self._score()
            self._converse(state, control)
        self._round.begin(state, self._site, self._ranks)

    def on_pre_optimizer_step(self) -> None:
        """Correct the gradients, where the method does."""
        self._round.apply()

    def on_step_end(self, state: TrainerState, control: TrainerControl) -> None:
        """At the end of a round: send it, and hear what comes next."""
        if self._final is not None:  # the end was known before this step: it does not count
            self._stop(control)
            control.should_evaluate = control.should_save = False
            return
        self._round.done += 1
        if self._round.done < self.steps:
            return
        left = control.should_training_stop and state.global_step < state.max_steps
        self._round.send(self._site, self._ranks)
        if not left:  # left: somebody else's callback stops the training
            own = evaluates_now(self.trainer, state, control)
            self._converse(state, control, own_evaluation=own)

    def on_evaluate(
        self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]
    ) -> None:
        """The Trainer's own evaluation of the global parameters is the server's as well."""
        if not self._scoring.waits or not self._scoring.take(metrics):
            return
        stopped = control.should_training_stop and state.global_step < state.max_steps
        self._score()
        if not stopped:
            self._converse(state, control)

    def on_save(self, state: TrainerState) -> None:
        """Mark the checkpoint as one of this run."""
        if state.is_world_process_zero:
            directory = Path(str(self.trainer.args.output_dir)) / f"checkpoint-{state.global_step}"
            if directory.is_dir():
                mark = replace(self._mark(), round=self._round.number, step=state.global_step)
                mark_checkpoint(directory, mark)

    def on_train_end(self, state: TrainerState, control: TrainerControl) -> None:
        """End with the server's parameters. Whoever stopped early trains no more, but waits."""
        if self._final is None:
            if self._scoring.waits:
                self._score()
            what = f"training has ended at step {state.global_step}, the run has not"
            self._talk.note(what, warn=True)
            self._round.leave(self._site, self._ranks, self._no_more(state))
            self._converse(state, control, may_train=False)
        assert self._final is not None
        self._site.end_with(self._final)
        written = self._site.export_whole()
        if written is not None:
            what = "save_model leaves out what the method has added to the base; all of it is in "
            self._talk.note(what + str(written), warn=True)
        self._talk.end(self._reason)

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
            self._tell("waiting")
            frame = self._talk.hear()
            try:
                answer = self._ranks.together(partial(self._answer, frame, state, may_train))
            except FedtuneError as error:
                self._talk.fail(told(error))
                if frame.kind == messages.SETUP:  # it will not fit later either
                    raise
                log.error("%s: %s", frame.kind, error)
                continue
            if answer is not None:
                self._talk.reply(answer)
            elif frame.kind == messages.EVALUATE:
                self._scoring.ask(frame.content)
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
                self._talk.reply(replies.finished(self.plan.client))
                return

    def _answer(self, frame: Frame, state: TrainerState, may_train: bool) -> RecordDict | None:
        """The reply, or None when more has to be done for it."""
        content, site = frame.content, self._site
        match frame.kind:
            case messages.PLAN:
                return site.planned()
            case messages.INITIAL:
                return site.initial()
            case messages.SETUP:
                site.set_up(content)
                return replies.set_up(self.plan.client)
            case messages.EVALUATE:
                site.refer(replies.round_of(content), content)
                site.show(content)
                return None
            case messages.TRAIN:
                if not may_train:
                    raise RoundError(self._no_more(state))
                self._round.ask(content, site)
                return None
            case messages.FINISH:
                self._final = site.last(content)
                self._sent = bool(messages.arrays_of(content))
                self._reason = str(config_of(content).get("reason", messages.DONE))
                return None
        raise RoundError(
            f"{self.plan.client}: expected a known request, received {frame.kind!r}. Use the same "
            "fedtune on both sides."
        )

    @property
    def _site(self) -> SiteModel:
        assert self._at_site is not None
        return self._at_site

    def _score(self) -> None:
        self._tell("evaluating")
        self._talk.reply(self._scoring.answer())

    def _stop(self, control: TrainerControl) -> None:
        assert self._final is not None
        self._site.end_with(self._final)
        control.should_training_stop = True

    def _no_more(self, state: TrainerState) -> str:
        return (
            f"{self.plan.client}: training has ended at step {state.global_step} of "
            f"{state.max_steps}, so this site trains no further round. See its own log for why."
        )

    def _tell(self, state: str) -> None:
        step = self.trainer.state.global_step
        self._talk.tell(state, round=self._round.number, step=step)
