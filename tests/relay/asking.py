"""The server's side of a site: Flower messages to the relay's ClientApp, in this process."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune._flower.task_message import task_identity

PLAN = {
    "run": "7",
    "num_rounds": 3,
    "steps": 5,
    "epochs": 0.0,
    "seed": 1,
    "carry": True,
    "idle_timeout_s": 60.0,
    "version": "0.1.0",
}


def send(
    kind: str,
    config: dict[str, object],
    *,
    run_id: int = 1,
    ttl: float = 30.0,
    node_config: dict[str, object] | None = None,
) -> RecordDict:
    """The content of the relay's reply; what it raises is what Flower would tell the server."""
    from fedtune.relay.app import app

    content = RecordDict({"config": ConfigRecord(config)})  # type: ignore[arg-type]
    if kind in ("train", "evaluate", "query.finish"):
        content["arrays"] = ArrayRecord({"w": Array(np.arange(4, dtype=np.float32))})
    context = Context(run_id, 5, node_config or {}, RecordDict(), {})  # type: ignore[arg-type]
    with task_identity(run_id, 5):
        reply = app(Message(content, 5, kind, ttl=ttl), context)
    return reply.content


def plan(
    run: str = "7", *, flower_run: int = 1, ttl: float = 30.0, **changes: object
) -> RecordDict:
    """`query.plan`."""
    return send("query.plan", {**PLAN, "run": run, **changes}, run_id=flower_run, ttl=ttl)


def train(round_: int, run: str = "7") -> RecordDict:
    """`train`."""
    return send("train", {"run": run, "round": round_, "manifest": "m"})


def finish(round_: int, run: str = "7", reason: str = "done") -> RecordDict:
    """`query.finish`."""
    return send("query.finish", {"run": run, "round": round_, "reason": reason})
