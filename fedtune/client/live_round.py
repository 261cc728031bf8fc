"""The round that a live Trainer is in: from the request to train to the update that answers it."""

from __future__ import annotations

import time

from flwr.app import RecordDict
from transformers import Trainer, TrainerState, set_seed

from fedtune.client import replies
from fedtune.client.client_round import ClientRound, refuse_fp16
from fedtune.client.conversation import Conversation
from fedtune.client.counter import BatchCounter
from fedtune.client.declared import within
from fedtune.client.live_trainer import move_to, optimizer_is_spoiled, restart_schedule
from fedtune.client.local import derive_seed
from fedtune.client.options import Options
from fedtune.client.ranks import Ranks
from fedtune.client.replies import Sent
from fedtune.client.session import Request
from fedtune.client.site_model import SiteModel
from fedtune.errors import ManifestError, RoundError
from fedtune.relay.folder import SitePlan
from fedtune.transport.messages import RoundTask

__all__ = ["LiveRound"]


class LiveRound:
    """One round after the other; `steps`: optimizer steps of each."""

    def __init__(
        self, trainer: Trainer, plan: SitePlan, steps: int, options: Options, talk: Conversation
    ) -> None:
        self._trainer, self._plan, self._options, self._talk = trainer, plan, options, talk
        self.steps = steps
        self.counter = BatchCounter(trainer)
        self.done = 0  # steps of this round
        self._task: RoundTask | None = None
        self._request: Request | None = None
        self._now: ClientRound | None = None
        self._started = 0.0

    @property
    def number(self) -> int:
        """Of the round that is trained, or was trained last; 0 before the first."""
        return self._task.round if self._task else 0

    def ask(self, content: RecordDict, site: SiteModel) -> None:
        """Take a request to train; its parameters are in the model then.

        Raises:
            FedtuneError: it is not for this adapter or run, or cannot be trained here.
        """
        task = RoundTask.of(content)
        if task.manifest != site.manifest.hash:
            raise ManifestError(
                f"{self._plan.client}: expected a round for adapter {site.manifest.hash[:12]}, "
                f"received one for {task.manifest[:12]}. Send setup again."
            )
        if not 1 <= task.round <= self._plan.num_rounds:
            raise RoundError(
                f"{self._plan.client}: expected a round from 1 to {self._plan.num_rounds} as "
                f"planned, received round {task.round}. Submit a new run."
            )
        refuse_fp16(task, self._trainer.args)
        site.refer(task.round - 1, content)
        now = ClientRound(task, Sent.of(content), site.recall(task), site.manifest)
        now.load(site.model)
        self._now, self._task, self._request = now, task, self._talk.request
        self.done, self._started = 0, 0.0

    def begin(self, state: TrainerState, site: SiteModel, ranks: Ranks) -> None:
        """Before a step: begin a round that was asked for."""
        if self._now is None or self._task is None or self._started:
            return
        self._started = time.perf_counter()
        self.counter.reset()
        self.take_place(state)
        if self._options.restart_lr:
            restart_schedule(self._trainer)
        self._now.begin(site.model, self._trainer.optimizer)
        spoiled = optimizer_is_spoiled(self._trainer, ranks)
        if spoiled:
            self._talk.note("the optimizer's state is not finite; it begins anew", warn=True)
        if self._options.reset_optimizer or not self._task.carry or spoiled:
            self._trainer.optimizer.state.clear()  # type: ignore[union-attr]
        if not self._task.carry:
            set_seed(derive_seed(self._task.seed, self._plan.client, self._task.round))

    def take_place(self, state: TrainerState) -> None:
        """Go on where the run is: a site that joins late or missed rounds is elsewhere."""
        if self._task is None:
            return
        step = (self._task.round - 1) * self.steps
        if step != state.global_step:
            self._talk.note(f"goes from step {state.global_step} to {step}, where the run is")
            move_to(self._trainer, state, step, schedule=not self._options.restart_lr)

    def apply(self) -> None:
        """Correct the gradients, where the method does."""
        if self._now is not None and self._started:
            self._now.apply()

    def send(self, site: SiteModel, ranks: Ranks) -> None:
        """Answer with what the model has become, after fewer steps than planned perhaps."""
        task, now, counter = self._task, self._now, self.counter
        assert task is not None
        assert now is not None
        outgoing = now.finish(site.model, collects=site.collects)
        self._now = None
        if outgoing.kept is not None:
            site.remember(task, outgoing.kept)
        examples, tokens, loss = ranks.total([counter.examples, counter.tokens, counter.loss])
        result = replies.LocalResult(
            params=outgoing.params,
            control_change=outgoing.control_change,
            num_examples=int(examples),
            num_tokens=int(tokens),
            num_steps=self.done,
            train_loss=loss / ranks.count / self.done,
            train_s=time.perf_counter() - self._started,
        )
        if self._request is not None:
            self._request.reply(
                replies.trained(self._plan.client, task, within(result, site.declared))
            )
        self._request, self.done = None, 0

    def leave(self, site: SiteModel, ranks: Ranks, reason: str) -> None:
        """Training ends: send what there is of a round, refuse one that has no step."""
        if self.done:
            self.send(site, ranks)
        elif self._request is not None:
            self._request.fail(reason)
        self._task = None

    def abort(self) -> None:
        """Training has failed: nothing stands still any more."""
        if self._now is not None:
            self._now.end()
