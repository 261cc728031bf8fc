"""What one client's reply may do to the others: through the real ServerApp, whatever the method."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor

from fedtune.errors import RoundError
from fedtune.server.checkpoint import ServerState
from fedtune.server.rounds.bounds import Bounds
from fedtune.server.store import RunStore
from fedtune.strategies import FedAvg, Method, build_method
from fedtune.strategies.krum import Krum
from fedtune.strategies.stock import Stock
from fedtune.transport.messages import RoundTask
from fedtune.transport.records import params_of, to_arrays
from tests.federation.scripted import Answer, Script, counted, number_of, replaced, serve
from tests.federation.small import result_of, same_tensors, server_run

LARGEST = 3e38


def moving(norm: Callable[[RoundTask], float]) -> Answer:
    """A client whose nine values move by the same, so far that the update has this norm."""

    def answer(content: RecordDict, task: RoundTask) -> RecordDict:
        name = str(content.config_records["config"]["client"])
        params = params_of(content.array_records["arrays"])
        step = norm(task) / 3
        still = dict.fromkeys(task.frozen)
        moved = {key: value - number_of(name) + step for key, value in params.items()}
        return replaced(content, **{**moved, **still})

    return answer


def sites(count: int, norm: Callable[[RoundTask], float], **answers: Answer) -> Script:
    """Clients that move as far as each other, but for some (client_2 is client-2)."""
    same = {f"client-{k}": moving(norm) for k in range(count)}
    return Script({**same, **{name.replace("_", "-"): one for name, one in answers.items()}})


def run(
    script: Script, clients: int = 3, *, bounds: Bounds | None = None, **given: Any
) -> ServerState:
    """The last state; good replies of all but one are enough unless `min_replies` says more."""
    server = server_run(clients, **{"min_replies": str(max(1, clients - 1)), **given})
    server.bounds = bounds or Bounds()
    return result_of(serve(server, script))


def refused(state: ServerState) -> list[list[tuple[str, str]]]:
    """Per round who, and why."""
    rows = [record["refused"] for record in state.history[1:]]
    return [[(row["client"], row["reason"]) for row in some] for some in rows]


METHODS = [
    "fedavg",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "diloco",
    "fednova",
    "trimmed_mean",
    "median",
    "fedbuff",
    "flwr:FedAdam",
    "flwr:FedMedian",
]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", [1, 5])
def test_a_huge_value_leaves_no_trace(name: str, when: int) -> None:
    """Parameters and the server's memory are those of a run without that client in that round."""
    settings: dict[str, float] = {"beta": 0.34} if name == "trimmed_mean" else {}
    rounds = {when}
    if name == "fedbuff":  # which does not ask everybody in every round
        settings, rounds = {"size": 2}, set(range(when, 12))

    def attack(content: RecordDict, task: RoundTask) -> RecordDict:
        content = moving(lambda task: 3.0)(content, task)
        if task.round in rounds:
            content = replaced(content, b=torch.tensor([0, LARGEST, 0]))
        return content

    def absent(content: RecordDict, task: RoundTask) -> RecordDict:
        if task.round in rounds:
            raise RuntimeError("down")
        return moving(lambda task: 3.0)(content, task)

    def ends(answer: Answer) -> ServerState:
        method = build_method(name, weight_by="tokens", settings=settings)
        script = sites(4, lambda task: 3.0, client_0=answer)
        return run(script, 4, method=method, num_rounds=11 if name == "fedbuff" else 6)

    attacked, without = ends(attack), ends(absent)
    assert same_tensors(attacked.params, without.params)
    assert attacked.method_state.keys() == without.method_state.keys()
    for key in attacked.method_state:
        assert same_tensors(attacked.method_state[key], without.method_state[key])
    assert max(float(value.abs().max()) for value in attacked.params.values()) < 100
    (who, why), *more = [row for rows in refused(attacked) for row in rows]
    assert not more or name == "fedbuff"
    assert who == "client-0"
    assert why.startswith("norm of the update: expected at most ")
    assert why.count("received 3e+38") == 1


def test_krum_does_not_see_it_either() -> None:
    attack = moving(lambda task: LARGEST)
    state = run(sites(5, lambda task: 3.0, client_3=attack), 5, method=Krum(f=0), num_rounds=2)
    assert [[who for who, _ in rows] for rows in refused(state)] == [["client-3"]] * 2
    assert torch.equal(state.params["b"], torch.full((3,), 2.0))


def test_the_bound_follows_the_rounds_before() -> None:
    """After three rounds of norm 3 it is 30."""
    far = {4: 29.0, 5: 31.0, 6: 30.0}
    script = sites(3, lambda task: 3.0, client_1=moving(lambda task: far.get(task.round, 3.0)))
    state = run(script, num_rounds=6)
    assert [[who for who, _ in rows] for rows in refused(state)] == [[]] * 4 + [["client-1"], []]
    why = "expected at most 30 (10 x the median of the last rounds), received 31"
    assert why in refused(state)[4][0][1]
    norms = [reply["norm"] for reply in state.history[4]["replies"]]
    assert norms == pytest.approx([3.0, 29.0, 3.0])


def test_a_rate_that_grows_from_zero_refuses_nobody() -> None:
    state = run(sites(3, lambda task: 0.01 * (task.round - 1)), num_rounds=10, min_replies=None)
    assert not any(record["refused"] for record in state.history[1:])
    assert {record["attempt"] for record in state.history[1:]} == {1}


def test_silos_of_very_unequal_size_refuse_nobody() -> None:
    """client-2 takes 90 times as many steps as the others, and moves as far."""

    def large(content: RecordDict, task: RoundTask) -> RecordDict:
        return counted(moving(lambda task: 90.0)(content, task), num_steps=90)

    def small(content: RecordDict, task: RoundTask) -> RecordDict:
        return counted(moving(lambda task: 1.0)(content, task), num_steps=1)

    script = Script({"client-0": small, "client-1": small, "client-2": large})
    state = run(script, num_rounds=8, steps=0, epochs=1.0, min_replies=None)
    assert not any(record["refused"] for record in state.history[1:])


class Alternating(FedAvg):
    """`a` trains in odd rounds, `b` in even ones."""

    def trains(self, name: str, server_round: int) -> bool:
        return (name == "a") == bool(server_round % 2)


def test_rounds_that_train_other_tensors_are_no_measure() -> None:
    """RoLoRA under SGD: one factor moves a thousand times as far as the other."""
    script = sites(3, lambda task: 3.0 if task.round % 2 else 3000.0)
    state = run(script, method=Alternating(), num_rounds=10, min_replies=None)
    assert not any(record["refused"] for record in state.history[1:])


def test_a_schedule_that_starts_again_is_taken_at_the_next_attempt() -> None:
    """All move 50 times as far from round 5 on: it is the round that differs, not a client."""
    script = sites(3, lambda task: 3.0 if task.round < 5 else 150.0)
    state = run(script, num_rounds=9, min_replies=None)
    assert [record["attempt"] for record in state.history[1:]] == [1, 1, 1, 1, 2, 2, 2, 1, 1]
    assert "norm of the update" in state.history[5]["failed_attempts"][0]["reason"]
    assert torch.equal(state.params["b"], torch.full((3,), 4 * 1.0 + 5 * 50.0))


def test_who_is_alone_far_out_stays_out() -> None:
    attack = moving(lambda task: 3.0 if task.round < 5 else 150.0)
    script = sites(3, lambda task: 3.0, client_0=attack)
    with pytest.raises(RoundError, match="round 5 failed 3 times.*client-0: norm of the update"):
        run(script, num_rounds=6, min_replies=None)


def test_a_rate_that_is_too_high_is_seen_as_divergence() -> None:
    """Not as a refusal: everybody's updates grow tenfold a round."""
    script = sites(3, lambda task: 0.01 * 10.0**task.round)
    script.eval_loss = lambda params: float(params["b"][0]) ** 2
    state = run(script, num_rounds=6, min_replies=None)
    assert state.history[-1]["eval_loss"] > 1e6


def test_clip_scales_to_the_bound() -> None:
    bounds = Bounds(update_check="clip", max_update_norm=6.0)
    script = sites(3, lambda task: 3.0, client_2=moving(lambda task: 3e30))
    state = run(script, num_rounds=5, bounds=bounds, min_replies=None)
    assert not any(record["refused"] for record in state.history[1:])
    rows = state.history[5]["replies"]
    assert [row["norm"] for row in rows] == pytest.approx([3.0, 3.0, 6.0])
    assert [row.get("norm_clipped_from") for row in rows] == [None, None, pytest.approx(3e30)]
    # Each round moves by the mean of 1, 1 and 2; sums of thirds in fp32.
    assert torch.allclose(state.params["b"], torch.full((3,), 5 * 4 / 3), rtol=1e-6)


def test_a_bound_of_the_users_own() -> None:
    script = sites(3, lambda task: 3.0, client_2=moving(lambda task: 7.0))
    state = run(script, num_rounds=1, bounds=Bounds(max_update_norm=6.0))
    assert "expected at most 6 (--max_update_norm), received 7" in refused(state)[0][0][1]


def test_a_resumed_run_has_the_same_bound(tmp_path: Path) -> None:
    def script() -> Script:
        far = moving(lambda task: 31.0 if task.round == 5 else 3.0)
        return sites(3, lambda task: 3.0, client_1=far)

    store = RunStore(tmp_path, num_rounds=4, save_every_rounds=1)
    run(script(), num_rounds=4, on_round=store.on_round)
    resumed = run(script(), num_rounds=5, start=store.load())
    whole = run(script(), num_rounds=5)
    assert refused(resumed) == refused(whole)
    assert refused(resumed)[4][0][0] == "client-1"
    assert same_tensors(resumed.params, whole.params)


def control(content: RecordDict, norm: float) -> RecordDict:
    """The reply with a change of the control variate."""
    each = torch.full((9,), norm / 3)
    content["control"] = to_arrays({"a": each[:6].reshape(2, 3), "b": each[6:]})
    return content


@pytest.mark.parametrize("when", [1, 5])
def test_control_variates_are_bounded_too(when: int) -> None:
    def ends(answer: Answer) -> ServerState:
        def honest(content: RecordDict, task: RoundTask) -> RecordDict:
            return control(content, 0.3)

        script = Script({"client-0": answer, "client-1": honest, "client-2": honest})
        method = build_method("scaffold", weight_by="tokens")
        return run(script, method=method, num_rounds=6)

    def attack(content: RecordDict, task: RoundTask) -> RecordDict:
        return control(content, 1e25 if task.round == when else 0.3)

    def absent(content: RecordDict, task: RoundTask) -> RecordDict:
        if task.round == when:
            raise RuntimeError("down")
        return control(content, 0.3)

    attacked, without = ends(attack), ends(absent)
    assert same_tensors(attacked.params, without.params)
    for key in attacked.method_state:
        assert same_tensors(attacked.method_state[key], without.method_state[key])
    why = refused(attacked)[when - 1][0][1]
    assert why.startswith("norm of the control variate's change: expected at most ")
    assert attacked.history[6]["replies"][0]["control_norm"] == pytest.approx(0.3)


def test_a_step_that_is_not_finite_is_a_failed_attempt(tmp_path: Path) -> None:
    """And leaves nothing behind: momentum that has overflowed would be in the way for ever."""
    store = RunStore(tmp_path, num_rounds=2, save_every_rounds=1)
    method = build_method("fedavgm", weight_by="tokens", settings={"lr": 1e39})
    script = sites(3, lambda task: 3.0, client_1=moving(lambda task: 5.0))
    script.answers["client-0"] = moving(lambda task: 3.0)
    why = r"round 1 failed 3 times: the server's step is not finite \(`a`\); the longest update is"
    with pytest.raises(RoundError, match=rf"{why} client-1's, norm 5"):
        run(script, method=method, num_rounds=2, on_round=store.on_round)
    state = store.load()
    assert state is not None
    assert (state.round, state.method_state) == (0, {}) if state.history else True


def test_a_strategy_of_flower_forgets_an_attempt_that_failed() -> None:
    """Its momentum, too, would be in the way of every later attempt."""
    method = build_method(
        "flwr:FedAvgM", weight_by="tokens", settings={"server_learning_rate": 1e39}
    )
    with pytest.raises(RoundError, match="the server's step is not finite"):
        run(sites(3, lambda task: 3.0), method=method, num_rounds=1)
    assert isinstance(method.rule, Stock)
    assert getattr(method.rule.strategy, "momentum_vector", "") is None


# Weights.


def heavy(tokens: int, norm: float = 3.0) -> Answer:
    return lambda c, t: counted(moving(lambda task: norm)(c, t), num_tokens=tokens)


def test_no_weight_decides_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """Two of 100 tokens move by 1; a third that claims 2^53 - 1 moves by 100, and has a half."""
    script = sites(3, lambda task: 3.0, client_1=heavy(2**53 - 1, 300.0))
    with caplog.at_level(logging.WARNING):
        state = run(script, num_rounds=1, min_replies=None)
    assert torch.equal(state.params["b"], torch.full((3,), (1 + 1 + 2 * 100) / 4))
    row = state.history[1]["replies"][1]
    assert (row["client"], row["weight"], row["weight_cut_from"]) == ("client-1", 200, 2**53 - 1)
    assert row["tokens"] == 2**53 - 1


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    script = sites(3, lambda task: 3.0, client_1=heavy(1000))
    with caplog.at_level(logging.WARNING):
        run(script, num_rounds=3)
    said = [text for text in caplog.messages if "--max_client_weight" in text]
    assert len(said) == 1
    assert "client-1" in said[0]
    assert "1000" in said[0]
    assert "200" in said[0]


@pytest.mark.parametrize(
    ("clients", "bounds", "method"),
    [
        (2, Bounds(), FedAvg()),
        (3, Bounds(max_client_weight=1.0), FedAvg()),
        (3, Bounds(), FedAvg(weight_by="uniform")),
        (3, Bounds(), Krum(f=0)),
        (3, Bounds(), FedAvg(weight_by="examples")),
    ],
    ids=["two", "off", "uniform", "krum", "examples"],
)
def test_where_nothing_is_cut(clients: int, bounds: Bounds, method: Method) -> None:
    script = sites(clients, lambda task: 3.0, client_1=heavy(1000))
    state = run(script, clients, bounds=bounds, method=method, num_rounds=1, min_replies=None)
    assert not any("weight" in row for row in state.history[1]["replies"])


def test_the_order_of_arrival_does_not_matter_where_weights_are_cut() -> None:
    """To the bit: whoever is heaviest, his update is the same wherever it comes."""
    tokens = (70, 9001, 110, 30)
    found: list[dict[str, Tensor]] = []
    for order in itertools.islice(itertools.permutations(tokens), 0, 24, 5):
        answers = {f"client-{k}": heavy(count, 0.1 + count / 70) for k, count in enumerate(order)}
        state = run(Script(answers), 4, num_rounds=1)
        found.append(state.params)
        rows = state.history[1]["replies"]
        assert [row["client"] for row in rows] == sorted(answers)
        assert {row["tokens"]: row["weight"] for row in rows if "weight" in row} == {9001: 210}
    assert all(same_tensors(found[0], other) for other in found)


def test_equal_updates_stay_what_they_are_where_weights_are_cut() -> None:
    script = sites(3, lambda task: 0.3, client_1=heavy(2**53 - 1, 0.3))
    state = run(script, num_rounds=1)
    one = run(sites(1, lambda task: 0.3), 1, num_rounds=1)
    assert same_tensors(state.params, one.params)


def test_who_has_not_answered_counts_as_before() -> None:
    """client-2 weighed 700 in round 1: with it, client-1's 600 are no more than half in round 2."""

    def leaving(content: RecordDict, task: RoundTask) -> RecordDict:
        if task.round == 2:
            raise RuntimeError("down")
        return heavy(700)(content, task)

    script = sites(3, lambda task: 3.0, client_1=heavy(600), client_2=leaving)
    state = run(script, num_rounds=2)
    assert [row.get("weight") for row in state.history[1]["replies"]] == [None] * 3
    assert [row.get("weight") for row in state.history[2]["replies"]] == [None] * 2


def test_fednova_goes_no_further_than_a_client_may() -> None:
    """A claim of 10^7 steps for one that all others take: the rate would be 2 x 10^6."""
    attack: Answer = lambda c, t: counted(moving(lambda task: 3.0)(c, t), num_steps=10**7)  # noqa: E731
    one: Answer = lambda c, t: counted(moving(lambda task: 3.0)(c, t), num_steps=1)  # noqa: E731
    script = Script({"client-0": one, "client-1": one, "client-2": attack})
    method = build_method("fednova", weight_by="tokens")
    state = run(script, method=method, num_rounds=4, steps=0, epochs=1.0)
    for record in state.history[1:]:
        assert record["update_norm"] == pytest.approx(10 * 3.0)
        assert record["server_rate"] == pytest.approx(10.0)


SAID = {"rows": 90, "steps": 4, "rows_per_step": 3, "tokens_per_step": 30}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"num_tokens": 121}, "num-tokens: expected 1 to 120 (declared before: 4 steps of at most"),
        ({"num_examples": 13}, "num-examples: expected 1 to 12 (declared before: 4 steps of at mo"),
        ({"num_steps": 5}, "num-steps: expected 1 to 4, received 5"),
        ({"num_steps": 2, "num_tokens": 61}, "num-tokens: expected 1 to 60 (declared before: 2"),
    ],
)
def test_more_than_was_declared_is_refused(given: dict[str, int], why: str) -> None:
    script = Script({"client-1": lambda c, t: counted(c, **{"num_examples": 6, **given})})
    script.declared = {"client-1": SAID}
    state = run(script, num_rounds=1)
    ((who, reason),) = refused(state)[0]
    assert who == "client-1"
    assert reason.startswith(why)
    assert reason.endswith(f"received {[*given.values()][-1]}")


def test_what_was_declared_is_accepted_also_where_a_site_has_a_budget_of_its_own() -> None:
    full: Answer = lambda c, t: counted(c, num_tokens=180, num_examples=18, num_steps=6)  # noqa: E731
    script = Script({"client-1": full})
    script.declared = {"client-1": {**SAID, "steps": 6}}  # the server plans 4
    assert refused(run(script, num_rounds=1)) == [[]]


def test_who_has_never_answered_counts_as_declared() -> None:
    """client-2 says 4 steps of 200 tokens: with it, client-1's 800 are no more than half."""

    def down(content: RecordDict, task: RoundTask) -> RecordDict:
        raise RuntimeError("down")

    script = sites(3, lambda task: 3.0, client_1=heavy(800), client_2=down)
    script.declared = {"client-2": {"steps": 4, "rows_per_step": 9, "tokens_per_step": 200}}
    assert not any("weight" in row for row in run(script, num_rounds=1).history[1]["replies"])
    script.declared = {}
    assert run(script, num_rounds=1).history[1]["replies"][1]["weight"] == 100
