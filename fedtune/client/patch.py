"""`fedtune.patch`: one line that makes a Trainer's script a federated client."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from fedtune.adapters import collect, warn_of_half_precision
from fedtune.adapters.sharded import is_sharded
from fedtune.client.callback import FedTuneCallback
from fedtune.client.codec_link import CodecLink
from fedtune.client.failing import note_failure
from fedtune.client.loader import check_loader
from fedtune.client.local import model_of, steps_of
from fedtune.client.options import Options
from fedtune.client.participant import Participant
from fedtune.client.ranks import Ranks
from fedtune.client.refusal import note_refusal
from fedtune.client.session import Session
from fedtune.client.site_checks import check_trainer
from fedtune.client.undisturbed import same_rng
from fedtune.data.embeddings import check_trainer_tokens
from fedtune.errors import ConfigError, FedtuneError
from fedtune.relay.folder import ENVIRONMENT, RunFolder, SitePlan

__all__ = ["install", "patch", "unpatch"]

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Trainer)
REFUSAL_S = 0.5  # how long the relay has to fetch why this script cannot take part


def patch(
    trainer: T,
    *,
    steps_per_round: int | None = None,
    epochs_per_round: float | None = None,
    reset_optimizer: bool = False,
    restart_lr: bool = False,
) -> T:
    """Make `trainer.train()` one whole federated run when `fedtune join` started this script.

    Run alone, it trains as ever. In a run, rounds x steps replaces `max_steps` and
    `num_train_epochs` at once; without a budget of its own the script takes the server's.

    Args:
        steps_per_round: optimizer steps per round.
        epochs_per_round: passes over this site's train rows per round, instead of steps.
        reset_optimizer: whether each round begins with a fresh optimizer.
        restart_lr: whether the LR schedule spans one round and begins again with each.

    Returns:
        The same trainer.

    Raises:
        ConfigError: both budgets, a trainer that is patched already or cannot take part, a second
            trainer in the same run, or a budget beyond the site's limit.
    """
    if _callback_of(trainer) is not None:
        raise ConfigError(
            "patch: expected a trainer without a FedTuneCallback, received one with it. Call "
            "fedtune.patch once, or fedtune.unpatch first."
        )
    callback = FedTuneCallback(
        steps_per_round=steps_per_round,
        epochs_per_round=epochs_per_round,
        reset_optimizer=reset_optimizer,
        restart_lr=restart_lr,
    )
    install(trainer, callback)
    try:
        _join(trainer, callback)
    except BaseException:
        _uninstall(trainer, callback)
        raise
    trainer.add_callback(callback)
    return trainer


def unpatch(trainer: T) -> T:
    """Undo `patch`: the trainer trains alone again, and the run's folder is free.

    A trainer that is not patched is returned as it is.
    """
    callback = _callback_of(trainer)
    if callback is not None:
        trainer.remove_callback(callback)
        _uninstall(trainer, callback)
    return trainer


def install(trainer: Trainer, callback: FedTuneCallback) -> None:
    """Lead `trainer.train` through the callback's participant; raises ConfigError for a second one.

    The run is joined when `train` is called, unless that was done before.
    """
    if callback.installed:
        raise ConfigError(
            "FedTuneCallback: expected one Trainer per callback, received a second one. Make a "
            "new FedTuneCallback for it."
        )
    callback.installed = True
    original = trainer.train

    def train(
        resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        _join(trainer, callback)
        if callback.participant is None:
            return original(resume_from_checkpoint, *args, **kwargs)
        return callback.participant.train(original, resume_from_checkpoint, *args, **kwargs)

    vars(trainer)["train"] = train
    callback.args_before = {
        name: getattr(trainer.args, name) for name in ("max_steps", "load_best_model_at_end")
    }


def _uninstall(trainer: Trainer, callback: FedTuneCallback) -> None:
    if callback.participant is not None:
        callback.participant.close("fedtune.unpatch was called")
        for name, value in callback.args_before.items():
            setattr(trainer.args, name, value)
    vars(trainer).pop("train", None)
    callback.participant, callback.installed, callback.joined = None, False, False


def _callback_of(trainer: Trainer) -> FedTuneCallback | None:
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, FedTuneCallback)]
    return found[0] if found else None


def _join(trainer: Trainer, callback: FedTuneCallback) -> None:
    """Own the run's folder and plan its steps, once; without a run, say so once."""
    if callback.joined:
        return
    ranks = Ranks(trainer.args)
    folder = RunFolder.of_environment() if ranks.first else None
    plan = ranks.together(lambda: _plan_of(folder))
    plan = _shared_plan(ranks, plan)
    if plan is None:
        callback.joined = True
        if ranks.first:
            log.warning("fedtune: not started by fedtune join, so this trainer trains alone.")
        return
    session = ranks.together(lambda: _session(trainer, folder, plan))
    try:
        steps = ranks.together(lambda: _prepare(trainer, plan, callback.options))
    except FedtuneError as error:
        note_refusal(folder, error)
        if session is not None:
            session.end(note_failure(error))
            time.sleep(REFUSAL_S)
            session.close()
        raise
    path = Path() if folder is None else folder.path
    callback.participant = Participant(trainer, session, plan, steps, callback.options, ranks, path)
    callback.joined = True
    if ranks.first:
        log.info("%s: %d rounds of %d steps", plan.client, plan.num_rounds, steps)


def _session(trainer: Trainer, folder: RunFolder | None, plan: SitePlan) -> Session | None:
    """A script that is started again for the same run goes on with what is in its output_dir."""
    if folder is None:
        return None
    name = f"_fedtune_transport-{plan.run}-{plan.client}"  # the Trainer uploads no name with _
    directory = Path(str(trainer.args.output_dir)) / name
    return Session(folder, CodecLink(directory, lambda: _whole_parameters(trainer)))


def _whole_parameters(trainer: Trainer) -> dict[str, Tensor]:
    """None where all processes would have to collect them."""
    model = model_of(trainer)
    return {} if is_sharded(model) else collect(model)


def _plan_of(folder: RunFolder | None) -> SitePlan | None:
    if folder is None:
        return None
    if folder.plan is None:
        raise ConfigError(
            f"{ENVIRONMENT}: expected the folder of a run, received {folder.path}, which has no "
            "plan. Start the script with fedtune join."
        )
    return folder.plan


def _shared_plan(ranks: Ranks, plan: SitePlan | None) -> SitePlan | None:
    text = ranks.share(json.dumps(None if plan is None else asdict(plan)).encode())
    plain = json.loads(text)
    return None if plain is None else SitePlan(**plain)


def _prepare(trainer: Trainer, plan: SitePlan, options: Options) -> int:
    """Set the whole run's steps before the LR schedule is made; returns those of a round."""
    check_trainer(trainer, options)
    check_loader(trainer, plan.client)
    check_trainer_tokens(trainer)
    warn_of_half_precision(model_of(trainer))
    steps = _steps_per_round(trainer, plan, options)
    total = plan.num_rounds * steps
    if 0 < plan.max_steps < total:
        raise ConfigError(
            f"{plan.client}: expected at most {plan.max_steps} steps in a run, the limit of this "
            f"site, received {plan.num_rounds} rounds x {steps} steps. Plan fewer, or raise the "
            "site's --max_steps."
        )
    args = trainer.args
    args.max_steps = total
    if args.load_best_model_at_end:
        args.load_best_model_at_end = False
        log.warning("fedtune: load_best_model_at_end is off, the server decides which is best.")
    return steps


def _steps_per_round(trainer: Trainer, plan: SitePlan, options: Options) -> int:
    own = (options.steps_per_round or 0, options.epochs_per_round or 0.0)
    planned = (plan.steps, plan.epochs)
    steps, epochs = own if any(own) else planned
    if any(own) and own != planned:
        log.warning(
            "fedtune: a round has %s as this script says, not %s as the server planned.",
            _words(*own),
            _words(*planned),
        )
    if steps:
        return steps
    if not epochs:
        raise ConfigError(
            f"{plan.client}: expected steps or epochs per round, received neither from the server "
            "nor from fedtune.patch. Give patch steps_per_round."
        )
    try:
        with same_rng():
            return steps_of(trainer, 0, epochs)
    except TypeError:
        raise ConfigError(
            f"{plan.client}: expected train rows with a length to count {epochs:g} epochs in, "
            "received a stream. Give patch steps_per_round."
        ) from None


def _words(steps: int, epochs: float) -> str:
    return f"{steps} steps" if steps else f"{epochs:g} epochs" if epochs else "nothing"
