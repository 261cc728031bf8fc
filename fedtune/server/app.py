"""The ServerApp: meet the clients, agree on the adapter, run the rounds, say goodbye."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedtune.adapters import Manifest, check, load_init_adapter
from fedtune.config import FederationArguments, TransportArguments
from fedtune.errors import FedtuneError, RoundError, RunStopped, private
from fedtune.extensions import WORKFLOWS
from fedtune.server.bases import Bases
from fedtune.server.checkpoint import ServerState
from fedtune.server.membership import ClientsHook, Membership
from fedtune.server.plan import Plan
from fedtune.server.rounds.bounds import DEFAULT, Bounds
from fedtune.server.rounds.check_update import reason_of
from fedtune.server.rounds.exchange import DirectExchange
from fedtune.server.rounds.workflow import Setting
from fedtune.server.run_rounds import AttemptHook, RoundHook, run_rounds
from fedtune.strategies import Method
from fedtune.strategies.agreement import check_manifest
from fedtune.strategies.registry import name_of
from fedtune.transport.codec_grid import CodecGrid
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import (
    DONE,
    EVALUATE,
    INITIAL,
    TRAIN,
    Member,
    PlanTask,
    arrays_of,
    pack,
)
from fedtune.transport.records import config_of
from fedtune.transport.settings import CodecSettings

__all__ = ["ServerRun", "server_app"]


@dataclass
class ServerRun:
    """All that a ServerApp needs, and where it leaves its result.

    Attributes:
        method: the aggregation.
        plan: rounds and budgets.
        min_clients: nodes to wait for before the first round.
        on_round: called with the state and the record of every finished round.
        on_attempt: called with every attempt at a round that failed.
        start: state to continue from, or None to begin.
        bounds: of what one client's reply may do.
        workflow: name of what a round is.
        init_adapter: directory of the first global adapter, or None to take a client's.
        join_timeout_s: how long to wait for them.
        deployed: whether clients are sites that come and go, and must be told of the end.
        on_clients: called with who takes part, and who does not and why, whenever that changes.
        codec: how tensors travel.
        bases: the base weights that clients must have.
        result: the last state, once the run is over.
    """

    method: Method
    plan: Plan
    min_clients: int
    on_round: RoundHook
    fraction_train: float = 1.0
    min_replies: str | None = None
    bounds: Bounds = DEFAULT
    workflow: str = "central"
    start: ServerState | None = None
    init_adapter: Path | None = None
    join_timeout_s: float = 120.0
    deployed: bool = False
    on_attempt: AttemptHook = lambda failure: None
    on_clients: ClientsHook = lambda clients: None
    codec: CodecSettings = CodecSettings()
    bases: Bases = field(default_factory=Bases)
    result: ServerState | None = field(default=None, init=False)
    error: FedtuneError | None = field(default=None, init=False)

    @classmethod
    def of(
        cls,
        federation: FederationArguments,
        plan: Plan,
        method: Method,
        *,
        on_round: RoundHook,
        min_clients: int,
        init_adapter: str | None,
        transport: TransportArguments | None = None,
    ) -> ServerRun:
        """The run that the flags of a federation and its transport ask for."""
        return cls(
            method,
            plan,
            min_clients,
            on_round,
            fraction_train=federation.fraction_train,
            min_replies=federation.min_replies,
            join_timeout_s=federation.round_timeout_s,
            bounds=Bounds.of(federation),
            workflow=federation.workflow,
            init_adapter=Path(init_adapter) if init_adapter else None,
            codec=CodecSettings.of(
                transport or TransportArguments(), refactors=method.properties.refactors
            ),
        )


def server_app(run: ServerRun) -> ServerApp:
    """A Flower ServerApp that runs `run` and fills its `result` or `error`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            run.result = serve(grid, run)
        except FedtuneError as error:
            run.error = error

    return app


def serve(connected: Grid, run: ServerRun) -> ServerState:
    """Run `run` over the nodes of a grid; returns the last state, raises FedtuneError."""
    coded = _coded(connected, run)
    grid = EagerGrid(coded or connected, wire=coded.wire if coded else None)
    members = Membership(
        grid,
        _plan_task(run.plan),
        min_clients=run.min_clients,
        join_timeout_s=run.join_timeout_s,
        patient=run.deployed,
        mixed_ranks=run.method.properties.mixed_ranks,
        bases=run.bases,
        on_change=run.on_clients,
    )
    if not run.deployed:
        return _run_all(grid, coded, run, members)
    state, reason = run.start, "failed"
    try:
        state = _run_all(grid, coded, run, members)
        reason = DONE
    except RunStopped:
        reason = "stopped"
        raise
    except FedtuneError as error:
        reason = _farewell(error)
        raise
    finally:
        state = members.state or state
        members.finish(reason, state, _personal(run.method, state))
    return state


def _farewell(error: FedtuneError) -> str:
    """What all sites are told of a run's failure: nothing that another site has told.

    Other errors speak of files of the server, or repeat what a site has sent.
    """
    if isinstance(error, RoundError):
        return f"failed: {error.outside}"
    return "failed: the server could not go on; its coordinator knows why"


def _coded(grid: Grid, run: ServerRun) -> CodecGrid | None:
    if run.codec.codec == "none":
        return None
    # Held-out rows in one place are the server's own: it scores what it has.
    kinds = {TRAIN, EVALUATE} if run.plan.sites_evaluate else {TRAIN}
    return CodecGrid(grid, run.codec, kinds=kinds, refactors=run.method.properties.refactors)


def _run_all(
    grid: EagerGrid, coded: CodecGrid | None, run: ServerRun, members: Membership
) -> ServerState:
    first = members.gather()
    state = run.start or _first_state(grid, first, run)
    if coded is not None and not state.round:
        coded.begin(state.params)
    members.admit(state)
    plan = run.plan
    exchange = DirectExchange(grid, timeout_s=plan.round_timeout_s, seed=plan.seed)
    workflow = WORKFLOWS[run.workflow](
        Setting(exchange, run.method, plan, run.fraction_train, run.min_replies, run.bounds)
    )
    last = run_rounds(workflow, exchange, plan, state, run.on_round, members, run.on_attempt)
    if run.deployed:  # a site that still trains would not hear the goodbye
        exchange.drain()
    return last


def _plan_task(plan: Plan) -> PlanTask:
    return PlanTask(
        run=plan.run,
        num_rounds=plan.num_rounds,
        steps=plan.steps,
        epochs=plan.epochs,
        carry=plan.carry,
        seed=plan.seed,
        idle_timeout_s=plan.round_timeout_s,
        version=version("fedtune"),
    )


def _first_state(grid: EagerGrid, member: Member, run: ServerRun) -> ServerState:
    message = Message(pack(config={"run": run.plan.run, "round": 0}), member.node, INITIAL)
    reply = next(grid.send_and_receive([message]), None)
    if reply is None or reply.has_error():
        problem = reason_of(reply) if reply else "it has left"
        raise RoundError(f"{private(member.name)} could not give its adapter: {private(problem)}")
    manifest = Manifest.from_json(str(config_of(reply.content)["manifest"]))
    check_manifest(f"--strategy {name_of(run.method)}", run.method.properties, manifest)
    run.codec.check_use(manifest.entries)
    if run.init_adapter is not None:
        params, static = load_init_adapter(run.init_adapter, manifest)
    else:
        params, static = arrays_of(reply.content), arrays_of(reply.content, "static")
        check(params, manifest)
        check(static, manifest, static=True)
    still = [name for name in manifest.entries if _never_trains(run.method, name)]
    tensors, frozen = {**static, **params}, manifest.frozen(still)
    return ServerState(
        round=0,
        params={name: tensors[name] for name in sorted(frozen.entries)},
        static={name: tensors[name] for name in sorted(frozen.static)},
        manifest=frozen,
    )


def _never_trains(method: Method, name: str) -> bool:
    """Rules that let a factor stand still do so always, or every other round."""
    return not method.rule.trains(name, 1) and not method.rule.trains(name, 2)


def _personal(method: Method, state: ServerState | None) -> list[str]:
    return [name for name in state.params if not method.rule.travels(name)] if state else []
