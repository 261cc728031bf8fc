"""The ClientApp of a deployed site: hands every message to the site's long-lived trainer.

Flower starts a new process for each message, so this module loads neither torch nor a model and
remembers nothing; arrays pass through as the bytes they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import FedtuneError, SiteError
from fedtune.failures import failure_of
from fedtune.relay.folder import Over, Progress, RunFolder, SitePlan
from fedtune.relay.frames import STARTING, encode
from fedtune.relay.link import StillStarting, ask
from fedtune.relay.site import SiteFolder
from fedtune.transport.packing import packed

__all__ = ["app"]

PATIENCE_S = 10.0  # with a script that starts; below the server's with its goodbye

log = logging.getLogger(__name__)

app = ClientApp(mods=[packed])


@app.query("plan")
def plan(message: Message, context: Context) -> Message:
    """Accept or refuse a run; acceptance starts the site's script.

    While that starts the answer is that it does, and the server asks again: a node takes one
    message at a time, and should hear of the run's end meanwhile.
    """
    site = SiteFolder.find(context.node_config)
    try:
        return _relay(
            message, context, lambda site: _begin(message, context, site), patience_s=PATIENCE_S
        )
    except StillStarting:
        starting = ConfigRecord({"client": site.name, STARTING: True})
        return Message(RecordDict({"config": starting}), reply_to=message)


@app.query("initial")
@app.query("setup")
@app.evaluate()
def hand_on(message: Message, context: Context) -> Message:
    """Ask the trainer of the run."""
    return _relay(message, context, lambda site: site.run(_run(message)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Ask the trainer of the run; the round that begins is noted for `fedtune join`."""

    def begin_round(site: SiteFolder) -> RunFolder:
        folder = site.run(_run(message))
        folder.write_progress(Progress(round=int(str(_config(message).get("round", 0)))))
        return folder

    return _relay(message, context, begin_round)


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """Let the trainer end; after its answer the site is free for the next run.

    A script that has no trainer yet would not hear it: `fedtune join` ends it.
    """
    site = SiteFolder.find(context.node_config)
    folder = site.known(_run(message))
    reason = str(_config(message).get("reason", "done"))
    if folder is None or not folder.lock.exists():
        if folder is not None:
            folder.write_over(Over(folder.flower_run, reason, at_once=True))
        return Message(
            RecordDict({"config": ConfigRecord({"client": site.name})}), reply_to=message
        )
    reply = hand_on(message, context)
    folder.write_progress(Progress(folder.progress.round, finished=True, reason=reason))
    return reply


def _relay(
    message: Message,
    context: Context,
    folder_of: Callable[[SiteFolder], RunFolder],
    patience_s: float | None = None,
) -> Message:
    """The trainer's reply; whatever goes wrong, Flower tells the server with the site's name."""
    site = SiteFolder.find(context.node_config)
    try:
        reply = ask(
            folder_of(site),
            encode(message.metadata.message_type, message.content),
            start_timeout_s=site.limits.start_timeout_s,
            timeout_s=message.metadata.ttl,  # a later reply would be refused by the SuperLink
            patience_s=patience_s,
        )
    except StillStarting:
        raise
    except OSError as error:
        raise SiteError(
            f"site {site.name}: {error.filename or site.path}: {error.strerror or error}. Look at "
            "the site's disk, and start fedtune join there again."
        ) from None
    except FedtuneError as error:
        raise SiteError(f"site {site.name}: {error.outside}") from None
    except Exception as error:  # its text may be about anything at the site
        failure = failure_of(error)
        log.exception("%s", failure.line)
        raise SiteError(f"site {site.name}: its relay failed: {failure.outside}") from None
    if reply.error is not None:
        raise SiteError(f"site {site.name}: {reply.error}")
    return Message(reply.content, reply_to=message)


def _begin(message: Message, context: Context, site: SiteFolder) -> RunFolder:
    return site.begin(_plan_of(message, site), str(context.run_id))


def _run(message: Message) -> str:
    return str(_config(message).get("run", ""))


def _plan_of(message: Message, site: SiteFolder) -> SitePlan:
    config = _config(message)
    try:
        return SitePlan(
            run=str(config["run"]),
            client=site.name,
            num_rounds=int(str(config["num_rounds"])),
            steps=int(str(config["steps"])),
            epochs=float(str(config["epochs"])),
            carry=bool(config["carry"]),
            seed=int(str(config["seed"])),
            idle_timeout_s=float(str(config["idle_timeout_s"])),
        )
    except (KeyError, ValueError) as error:
        raise SiteError(
            f"plan: expected numbers for rounds, steps, epochs, seed and idle_timeout_s, received "
            f"{dict(config)} ({type(error).__name__}: {error}). Use the same fedtune on both sides."
        ) from None


def _config(message: Message) -> ConfigRecord:
    return message.content.config_records.get("config", ConfigRecord())
