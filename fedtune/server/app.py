"""The ServerApp: meet the clients, agree on the adapter, run the rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedtune.adapters import Manifest, check, load_init_adapter
from fedtune.errors import FedtuneError, RoundError
from fedtune.server.checkpoint import ServerState
from fedtune.server.rounds import Plan, RoundHook, run_rounds
from fedtune.strategies import Method
from fedtune.strategies.shell import FedStrategy
from fedtune.strategies.updates import one_line
from fedtune.transport.grid import EagerGrid, Traffic
from fedtune.transport.messages import INITIAL, SETUP, pack
from fedtune.transport.records import config_of, params_of

__all__ = ["ServerRun", "server_app"]

JOIN_TIMEOUT_S = 120.0


@dataclass
class ServerRun:
    """All that a ServerApp needs, and where it leaves its result.

    Attributes:
        method: the aggregation.
        plan: rounds and budgets.
        num_clients: nodes to wait for.
        on_round: called with the state and the record of every finished round.
        start: state to continue from, or None to begin.
        init_adapter: directory of the first global adapter, or None to take a client's.
        result: the last state, once the run is over.
    """

    method: Method
    plan: Plan
    num_clients: int
    on_round: RoundHook
    fraction_train: float = 1.0
    min_replies: str | None = None
    start: ServerState | None = None
    init_adapter: Path | None = None
    result: ServerState | None = field(default=None, init=False)
    error: FedtuneError | None = field(default=None, init=False)


def server_app(run: ServerRun) -> ServerApp:
    """A Flower ServerApp that runs `run` and fills its `result` or `error`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            run.result = _serve(EagerGrid(grid), run)
        except FedtuneError as error:
            run.error = error

    return app


def _serve(grid: EagerGrid, run: ServerRun) -> ServerState:
    nodes = _wait_for_nodes(grid.get_node_ids, run.num_clients)
    state = run.start or _first_state(grid, nodes[0], run.init_adapter)
    grid.traffic = Traffic()
    clients = _set_up(grid, nodes, state)
    strategy = FedStrategy(
        run.method,
        state.manifest,
        clients,
        fraction_train=run.fraction_train,
        min_replies=run.min_replies,
        seed=run.plan.seed,
    )
    return run_rounds(grid, strategy, run.plan, state, run.on_round)


def _wait_for_nodes(get_node_ids: Callable[[], list[int]], count: int) -> list[int]:
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while len(nodes := get_node_ids()) < count:
        if time.monotonic() > deadline:
            raise RoundError(
                f"expected {count} clients within {JOIN_TIMEOUT_S:.0f} s, {len(nodes)} are there."
            )
        time.sleep(0.05)
    return nodes


def _first_state(grid: EagerGrid, node: int, init_adapter: Path | None) -> ServerState:
    (reply,) = _ask(grid, [Message(pack(config={"round": 0}), node, INITIAL)])
    manifest = Manifest.from_json(str(config_of(reply.content)["manifest"]))
    if init_adapter is not None:
        params, static = load_init_adapter(init_adapter, manifest)
        return ServerState(round=0, params=params, static=static, manifest=manifest)
    params = params_of(reply.content.array_records["arrays"])
    static_record = reply.content.array_records.get("static")
    static = params_of(static_record) if static_record else {}
    check(params, manifest)
    check(static, manifest, static=True)
    return ServerState(round=0, params=params, static=static, manifest=manifest)


def _set_up(grid: EagerGrid, nodes: list[int], state: ServerState) -> dict[int, str]:
    """Hand every client the manifest and the static tensors; returns node -> client name."""
    content = pack(arrays=state.static, config={"manifest": state.manifest.to_json()})
    replies = _ask(grid, [Message(content, node, SETUP) for node in nodes])
    names = {
        reply.metadata.src_node_id: str(config_of(reply.content)["client"]) for reply in replies
    }
    if len(set(names.values())) < len(nodes):
        raise RoundError(f"expected {len(nodes)} clients, {sorted(names.values())} answered.")
    return names


def _ask(grid: EagerGrid, messages: list[Message]) -> list[Message]:
    replies = []
    for reply in grid.send_and_receive(messages, timeout=None):
        if reply.has_error():
            raise RoundError(f"a client could not start: {one_line(reply.error.reason)}")
        replies.append(reply)
    return replies
