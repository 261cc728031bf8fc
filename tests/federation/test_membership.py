"""Sites of a deployment join late, leave, come back, refuse, and are told of the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.adapters import Entry, Manifest
from fedtune.engines.inline import InlineGrid
from fedtune.errors import ConfigError, RoundError
from fedtune.server import membership
from fedtune.server.app import ServerRun
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import FedAvg, Method
from fedtune.strategies.lora import FlexLoRA
from fedtune.transport.messages import RoundTask, pack
from fedtune.transport.packing import packed
from fedtune.transport.records import params_of
from tests.federation.scripted import MANIFEST, Script, ScriptedGrid, name_of, serve
from tests.federation.small import result_of, server_run

FIRST_NODE = 2


class Deployment(Script):
    """Scripted sites that remember whom they were asked what, and what `finish` told them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[tuple[str, str]] = []
        self.finished: dict[str, tuple[float, str]] = {}
        self.refuse: dict[str, str] = {}
        self.manifests: dict[str, Manifest] = {}
        self.starting: dict[str, int] = {}  # how often a site says that its script starts

    def app(self) -> ClientApp:
        app = ClientApp(mods=[packed])
        scripted = super().app()

        def noted(message: Message, context: Context) -> Message:
            kind, name = message.metadata.message_type, name_of(context)
            self.asked.append((name, kind))
            if kind == "query.plan":
                if name in self.refuse:
                    raise RuntimeError(self.refuse[name])
                if self.starting.get(name, 0) > 0:
                    self.starting[name] -= 1
                    return Message(
                        pack(config={"client": name, "starting": True}), reply_to=message
                    )
                config: dict[str, str | int | float | bool] = {
                    "client": name,
                    "evaluates": True,
                    "manifest": self.manifests.get(name, MANIFEST).to_json(),
                    **self.declared.get(name, {}),
                }
                return Message(pack(config=config), reply_to=message)
            if kind == "query.finish":
                arrays = message.content.array_records.get("arrays")
                last = math.nan if arrays is None else float(params_of(arrays)["b"][0])
                reason = str(message.content.config_records["config"]["reason"])
                self.finished[name] = (last, reason)
                return Message(pack(config={"client": name}), reply_to=message)
            return scripted(message, context)

        for kind in ("plan", "initial", "setup", "finish"):
            app.query(kind)(noted)
        app.train()(noted)
        app.evaluate()(noted)
        return app


def deployed(clients: int, **options: Any) -> ServerRun:
    run = server_run(clients, **options)
    run.deployed = True
    run.join_timeout_s = 0.3
    return run


def serve_sites(
    run: ServerRun, sites: Deployment, there: Callable[[int], Iterable[int]], nodes: int
) -> ServerRun:
    """`there(round)` numbers the sites that are connected once a round has been finished."""
    rounds = 0

    class Sites(ScriptedGrid):
        def get_node_ids(self) -> Iterable[int]:
            return [FIRST_NODE + k for k in there(rounds)]

    inner = run.on_round

    def on_round(state: ServerState, record: dict[str, Any]) -> None:
        nonlocal rounds
        rounds = state.round
        inner(state, record)

    run.on_round = on_round
    clients, run.min_clients = run.min_clients, nodes  # the grid has as many nodes as that

    class Fewer(Sites):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            run.min_clients = clients

    return serve(run, sites, grid_type=Fewer)


def trained(sites: Deployment) -> list[tuple[str, int]]:
    return [(name, task.round) for name, task in sites.tasks]


def test_a_site_joins_late_leaves_and_comes_back() -> None:
    """client-2 joins after round 1, client-1 is away in round 3: every round has who is there.

    Values: each site adds its number to the global `b`, the mean of those there is taken.
    """
    sites = Deployment()
    there = {0: [0, 1], 1: [0, 1, 2], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2]}
    run = serve_sites(deployed(2, num_rounds=4), sites, lambda done: there[done], nodes=3)
    state = result_of(run)
    per_round = {r: sorted(n for n, k in trained(sites) if k == r) for r in range(1, 5)}
    assert per_round[1] == ["client-0", "client-1"]
    assert per_round[3] == ["client-0", "client-2"]
    assert per_round[4] == ["client-0", "client-1", "client-2"]
    assert per_round[2] == ["client-0", "client-1", "client-2"]
    assert torch.equal(state.params["b"], torch.full((3,), 1.5 + 2.0 + 2.0 + 2.0))
    assert sites.asked.count(("client-1", "query.plan")) == 2  # asked anew when it came back


def test_a_site_whose_script_starts_is_asked_again_and_takes_part() -> None:
    sites = Deployment()
    sites.starting["client-1"] = 3
    shown: list[list[dict[str, Any]]] = []
    run = deployed(2, num_rounds=1)
    run.on_clients = lambda rows: shown.append(rows)
    result_of(serve_sites(run, sites, lambda done: [0, 1], nodes=2))
    assert sites.asked.count(("client-1", "query.plan")) == 4
    assert trained(sites) == [("client-0", 1), ("client-1", 1)]
    names = {row["client"] for rows in shown[3:] for row in rows}
    assert "client-1" in names  # known before it is there
    assert all(row["problem"] is None for rows in shown for row in rows)


def test_a_site_whose_script_still_starts_is_told_of_the_end() -> None:
    sites = Deployment()
    sites.starting["client-1"] = 10**6
    run = serve_sites(deployed(2, num_rounds=1), sites, lambda done: [0, 1], nodes=2)
    with pytest.raises(RoundError, match="expected 2 clients within 0 s, 1 are there"):
        result_of(run)
    assert sites.finished.keys() == {"client-0", "client-1"}
    assert {reason[:30] for _, reason in sites.finished.values()} == {
        "failed: expected 2 clients wit"
    }


def test_every_site_is_told_of_the_end_with_the_last_global() -> None:
    sites = Deployment()
    state = result_of(serve_sites(deployed(2, num_rounds=2), sites, lambda done: [0, 1], nodes=2))
    last = float(state.params["b"][0])
    assert sites.finished == {"client-0": (last, "done"), "client-1": (last, "done")}


def test_a_failed_run_says_so_at_the_sites() -> None:
    sites = Deployment(answers={"client-1": _fail})
    run = deployed(2, num_rounds=2, max_failed_rounds=0)
    with pytest.raises(RoundError, match="round 1 failed"):
        result_of(serve_sites(run, sites, lambda done: [0, 1], nodes=2))
    # the one that failed is no member until it has been asked again, but its trainer waits
    assert sites.finished.keys() == {"client-0", "client-1"}
    assert all(reason.startswith("failed: round 1 failed") for _, reason in sites.finished.values())


def test_no_site_hears_why_another_one_failed() -> None:
    """What a site says may be of its rows, and the coordinator alone has asked for it."""

    def leaking(content: RecordDict, task: RoundTask) -> RecordDict:
        raise RuntimeError("cannot tokenize Jane Roe")

    sites = Deployment(answers={"client-0": leaking})
    run = deployed(2, num_rounds=2, max_failed_rounds=0)
    with pytest.raises(RoundError, match=r"client-0: client failed: .*Jane Roe"):
        result_of(serve(run, sites))
    told = [reason for _, reason in sites.finished.values()]
    assert len(told) == 2
    assert set(told) == {
        "failed: round 1 failed 1 times: 1 of 2 needed updates (…). Fix the clients, or allow "
        "fewer with --min_replies."
    }


def test_no_site_hears_why_another_one_was_not_let_in() -> None:
    sites = Deployment()
    sites.refuse = {"client-1": "no rows of Jane Roe"}
    run = deployed(2, num_rounds=1)
    with pytest.raises(RoundError, match=r"client-0.*no rows of Jane Roe"):
        result_of(serve(run, sites))
    (told,) = {reason for _, reason in sites.finished.values()}
    assert told.startswith("failed: expected 2 clients within 0 s, 1 are there (…)")
    assert "Jane" not in told
    assert "client" not in told.removeprefix("failed: expected 2 clients")


def test_no_site_hears_of_the_servers_own_errors() -> None:
    sites = Deployment()
    run = deployed(1, num_rounds=1)

    def full(state: ServerState, record: dict[str, Any]) -> None:
        raise ConfigError("--output_dir: cannot write /home/jane/secret")

    run.on_round = full
    with pytest.raises(ConfigError):
        result_of(serve(run, sites))
    ((_, told),) = sites.finished.values()
    assert told == "failed: the server could not go on; its coordinator knows why"


def test_a_site_that_failed_is_asked_from_the_start_before_its_next_round() -> None:
    failures = iter([True, False, False])

    def once(content: Any, task: RoundTask) -> Any:
        return _fail(content, task) if next(failures) else content

    sites = Deployment(answers={"client-1": once})
    state = result_of(serve_sites(deployed(2, num_rounds=1), sites, lambda done: [0, 1], nodes=2))
    assert state.history[1]["attempt"] == 2
    assert sites.asked.count(("client-1", "query.plan")) == 2
    assert sites.asked.count(("client-0", "query.plan")) == 1


def test_a_site_that_failed_and_left_is_why_a_run_ends() -> None:
    """`join --once` ends with its script: that nobody is there is not the reason."""
    gone: list[bool] = []

    def fails(content: RecordDict, task: RoundTask) -> RecordDict:
        gone.append(True)
        raise RuntimeError("cannot tokenize Jane Roe")

    sites = Deployment(answers={"client-1": fails})
    run = serve_sites(
        deployed(2, num_rounds=1), sites, lambda done: [0] if gone else [0, 1], nodes=2
    )
    words = r"1 of 2 needed updates \(client-1: .*Jane Roe\); after that expected 2 .* \(client-0\)"
    with pytest.raises(RoundError, match=words):
        result_of(run)
    ((_, told),) = sites.finished.values()
    assert told.startswith("failed: …; after that expected 2 clients")
    assert "Jane" not in told


def test_who_refuses_is_named_with_the_reason() -> None:
    sites = Deployment()
    sites.refuse = {"client-1": "at most 2 rounds"}
    run = deployed(2)
    shown: list[list[dict[str, Any]]] = []
    run.on_clients = shown.append
    expected = r"expected 2 clients within 0 s, 1 are there \(client-0\).*at most 2 rounds"
    with pytest.raises(RoundError, match=expected):
        result_of(serve_sites(run, sites, lambda done: [0, 1], nodes=2))
    assert [row["state"] for row in shown[-1]] == ["planned", "refused"]
    assert "at most 2 rounds" in shown[-1][1]["problem"]


def test_who_refused_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy site becomes free."""
    monkeypatch.setattr(membership, "RETRY_S", 0.05)
    sites = Deployment()
    asked = 0

    class Busy(dict[str, str]):
        def __contains__(self, name: object) -> bool:
            nonlocal asked
            asked += name == "client-1"
            return name == "client-1" and asked < 3

    sites.refuse = Busy({"client-1": "busy with another run"})
    run = deployed(2, num_rounds=1)
    run.join_timeout_s = 20.0
    result_of(serve_sites(run, sites, lambda done: [0, 1], nodes=2))
    assert sites.asked.count(("client-1", "query.plan")) == 3


def test_who_leaves_before_it_is_asked_is_asked_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flower has no id for a message to a node that it has just lost."""
    monkeypatch.setattr(membership, "RETRY_S", 0.05)
    monkeypatch.setattr(ScriptedGrid, "push_messages", _without("query.plan"))
    sites = Deployment()
    run = deployed(2, num_rounds=1)
    run.join_timeout_s = 20.0
    result_of(serve_sites(run, sites, lambda done: [0, 1], nodes=2))
    assert {name for name, _ in trained(sites)} == {"client-0", "client-1"}


def test_who_leaves_before_it_gives_its_adapter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedGrid, "push_messages", _without("query.initial"))
    run = deployed(2, num_rounds=1)
    with pytest.raises(RoundError, match="client-0 could not give its adapter: it has left"):
        result_of(serve_sites(run, Deployment(), lambda done: [0, 1], nodes=2))


def _without(kind: str) -> Callable[..., Iterable[str]]:
    """The first message of this kind finds no node."""
    push, lost = InlineGrid.push_messages, []

    def push_messages(grid: InlineGrid, messages: Iterable[Message]) -> Iterable[Any]:
        for message in messages:
            if message.metadata.message_type == kind and not lost:
                lost.append(message)
                yield None
            else:
                yield from push(grid, [message])

    return push_messages


def test_a_site_with_another_adapter_does_not_take_part() -> None:
    other = Manifest(**{**vars(MANIFEST), "adapter_config": {"peft_type": "LORA", "r": 4}})
    sites = Deployment()
    sites.manifests = {"client-1": other}
    shown: list[list[dict[str, Any]]] = []
    run = deployed(1, num_rounds=2)
    run.on_clients = shown.append
    result_of(serve_sites(run, sites, lambda done: [0, 1], nodes=2))
    assert {name for name, _ in trained(sites)} == {"client-0"}
    assert "expected r 2, built 4" in shown[-1][1]["problem"]


def test_the_mean_evaluation_is_weighted_and_each_score_kept() -> None:
    """Both sites score 5 examples: the mean of equal losses; the record names both."""
    sites = Deployment(eval_loss=lambda params: 2.0)
    run = deployed(2, num_rounds=1, sites_evaluate=True)
    state = result_of(serve_sites(run, sites, lambda done: [0, 1], nodes=2))
    assert state.history[1]["eval_loss"] == 2.0
    assert [row["client"] for row in state.history[1]["eval_clients"]] == ["client-0", "client-1"]


def _fail(content: Any, task: RoundTask) -> Any:
    raise RuntimeError("out of memory")


def lora(rank: int, alpha: float) -> Manifest:
    """A site's adapter: one layer 5 -> 3."""
    entries = {
        "m.lora_A.weight": Entry((rank, 5), "float32"),
        "m.lora_B.weight": Entry((3, rank), "float32"),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    return Manifest("LORA", "base", config, entries, scaling={"m": alpha / rank})


def admitted(method: Method, sites: Deployment) -> tuple[list[dict[str, Any]], str]:
    """Who is there before round 1 of a run that starts from client-0's adapter, and the error."""
    start = {name: torch.zeros(e.shape) for name, e in sites.manifests["client-0"].entries.items()}
    rows: list[dict[str, Any]] = []
    run = deployed(2, method=method)
    run.start = ServerState(0, start, {}, sites.manifests["client-0"])
    run.on_clients = lambda found: rows.__setitem__(slice(None), found)
    serve(run, sites)
    return rows, str(run.error)


@pytest.mark.parametrize(
    ("method", "alpha", "expected"),
    [
        (
            FedAvg(),
            4,
            "LoRA rank: expected 4 as at the first site, built 2. Use one r everywhere, or a "
            "--strategy for mixed ranks: flora, flexlora, hetlora, raflora.",
        ),
        (FlexLoRA(), 8, "expected lora_alpha 4, built 8; set lora_alpha so that lora_alpha / r is"),
    ],
    ids=["ranks", "scaling"],
)
def test_another_rank_or_scaling_is_refused(method: Method, alpha: float, expected: str) -> None:
    """Sites 0 and 1 have ranks 4 and 2; the first one's scaling is 2."""
    sites = Deployment()
    sites.manifests = {"client-0": lora(4, 8), "client-1": lora(2, alpha)}
    rows, error = admitted(method, sites)
    assert [(row["client"], row["state"]) for row in rows] == [
        ("client-0", "ready"),
        ("client-1", "refused"),
    ]
    assert expected in rows[1]["problem"]
    assert "client-1: " in error
    assert expected in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ({"rows": 10**11}, "rows: expected 0 to 10000000000, received 100000000000"),
        ({"steps": -1}, "steps: expected 0 to 10000000, received -1"),
        ({"rows_per_step": 2, "tokens_per_step": 2**26}, "tokens_per_step: expected 0 to 33554432"),
        ({"steps": 1.5}, "steps: expected a whole number, received 1.5"),
    ],
)
def test_a_site_that_says_it_can_do_what_none_can_is_refused(
    declared: dict[str, int], problem: str
) -> None:
    sites = Deployment(declared={"client-1": declared})
    run = deployed(2, num_rounds=1)
    with pytest.raises(RoundError, match=f"client-1: {problem}"):
        result_of(serve(run, sites))
