"""What counts as an update, how many a round needs, and what happens when there are too few."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedtune._flower.task_message import client_failed
from fedtune.adapters import load_exported
from fedtune.errors import RoundError
from fedtune.server.checkpoint import load_latest
from fedtune.server.rounds.round_result import needed_replies, sample_clients
from fedtune.server.store import RunStore
from fedtune.transport.messages import RoundTask
from tests.federation.scripted import (
    Answer,
    Script,
    configured,
    counted,
    replaced,
    serve,
    with_arrays,
)
from tests.federation.small import eval_losses, result_of, server_run

NAN, INF = float("nan"), float("inf")


def raising(content: RecordDict, task: RoundTask) -> RecordDict:
    raise RuntimeError("CUDA out of memory\nin line two")


def torn(content: RecordDict, task: RoundTask) -> RecordDict:
    array = content.array_records["arrays"]["a"]
    content.array_records["arrays"]["a"] = Array(array.dtype, array.shape, array.stype, b"\x93NUM")
    return content


def pickled(content: RecordDict, task: RoundTask) -> RecordDict:
    content.array_records["arrays"]["a"] = Array("float32", (2, 3), "torch.pickle", b"\x80\x04.")
    return content


BAD: dict[str, tuple[Answer, str]] = {
    "nan": (lambda c, t: replaced(c, b=torch.tensor([0, NAN, 0])), "`b` is not finite"),
    "inf": (lambda c, t: replaced(c, a=torch.full((2, 3), -INF)), "`a` is not finite.*6 NaN or"),
    "missing": (lambda c, t: replaced(c, b=None), "`b` is missing"),
    "extra": (lambda c, t: replaced(c, z=torch.zeros(1)), "`z` is unknown"),
    "shape": (lambda c, t: replaced(c, a=torch.zeros(3, 2)), "`a` has the wrong shape"),
    "broadcastable": (lambda c, t: replaced(c, b=torch.zeros(1)), "`b` has the wrong shape"),
    "dtype": (lambda c, t: replaced(c, b=torch.zeros(3).double()), "`b` has the wrong dtype"),
    "half": (lambda c, t: replaced(c, b=torch.zeros(3).bfloat16()), "`b` has the wrong dtype"),
    "no-arrays": (lambda c, t: with_arrays(c, None), "empty: expected parameters"),
    "empty-arrays": (lambda c, t: with_arrays(c, ArrayRecord()), "empty: expected parameters"),
    "nothing": (lambda c, t: RecordDict(), "stale: expected round 1, received None"),
    "stale": (lambda c, t: configured(c, round=t.round - 1), "stale: expected round 1, received 0"),
    "early": (lambda c, t: configured(c, round=t.round + 1), "stale: expected round 1, received 2"),
    "round-as-text": (
        lambda c, t: configured(c, round="1"),
        "stale: expected round 1, received '1",
    ),
    "manifest": (lambda c, t: configured(c, manifest="0" * 64), "other adapter.*received 0000"),
    "manifest-type": (lambda c, t: configured(c, manifest=3), "other adapter"),
    "no-examples": (lambda c, t: counted(c, num_examples=None), "num-examples.*received None"),
    "zero-examples": (lambda c, t: counted(c, num_examples=0), "num-examples.*received 0"),
    "zero-tokens": (lambda c, t: counted(c, num_tokens=0), "num-tokens.*received 0"),
    "negative": (lambda c, t: counted(c, num_tokens=-5), "num-tokens.*received -5"),
    "huge": (lambda c, t: counted(c, num_tokens=2**60), "num-tokens.*received 1152921504606846976"),
    "float": (lambda c, t: counted(c, num_tokens=1.5), "num-tokens.*received 1.5"),
    "whole-float": (lambda c, t: counted(c, num_tokens=100.0), "num-tokens.*received 100.0"),
    "nan-count": (lambda c, t: counted(c, num_examples=NAN), "num-examples.*received nan"),
    "list": (lambda c, t: counted(c, num_tokens=[1, 2]), "num-tokens.*received"),
    "no-tokens": (lambda c, t: counted(c, num_tokens=None), "num-tokens.*received None"),
    "no-steps": (lambda c, t: counted(c, num_steps=None), "num-steps.*received None"),
    "raises": (raising, "client failed: .*CUDA out of memory in line two"),
    "torn": (torn, "a: expected a tensor .* that do not decode"),
    "pickle": (pickled, "a: expected a tensor .* that do not decode"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_update_is_refused_and_the_others_are_folded(name: str) -> None:
    """Clients 0 and 2 add 1 and 3 to the zeros; equal weights: the mean is 2."""
    answer, reason = BAD[name]
    script = Script({"client-1": answer})
    state = result_of(serve(server_run(3, min_replies="2", num_rounds=1), script))
    record = state.history[1]
    assert [reply["client"] for reply in record["replies"]] == ["client-0", "client-2"]
    (refused,) = record["refused"]
    assert (refused["client"], refused["node"]) == ("client-1", 3)
    assert re.search(reason, refused["reason"])
    assert "\n" not in refused["reason"]
    assert len(refused["reason"]) <= 300
    assert all(torch.equal(value, torch.full_like(value, 2.0)) for value in state.params.values())
    assert state.client_rounds == {"client-0": 1, "client-2": 1}
    json.dumps(record, allow_nan=False)


def test_a_reason_is_cut_to_a_line() -> None:
    def shouting(content: RecordDict, task: RoundTask) -> RecordDict:
        raise RuntimeError("x" * 10_000)

    script = Script({"client-0": shouting})
    state = result_of(serve(server_run(2, min_replies="1", num_rounds=1), script))
    assert len(state.history[1]["refused"][0]["reason"]) < 350


@pytest.mark.parametrize("loss", [NAN, INF, None])
def test_a_training_loss_that_is_no_number_is_left_out(loss: float | None) -> None:
    """The update itself is checked; the loss is only reported."""
    script = Script({"client-0": lambda c, t: counted(c, train_loss=loss)})
    state = result_of(serve(server_run(2, num_rounds=1), script))
    assert state.history[1]["train_loss"] == 2.0
    assert state.history[1]["replies"][0]["train_loss"] is None
    json.dumps(state.history, allow_nan=False)


def test_tokens_weigh() -> None:
    """(100 * 1 + 300 * 2) / 400 = 1.75, exact in binary."""
    script = Script({"client-1": lambda c, t: counted(c, num_tokens=300)})
    state = result_of(serve(server_run(2, num_rounds=1), script))
    assert torch.equal(state.params["b"], torch.full((3,), 1.75))
    assert (state.history[1]["samples"], state.history[1]["tokens"]) == (20, 400)


def test_an_answer_that_comes_twice_counts_once() -> None:
    state = result_of(
        serve(
            server_run(2, num_rounds=1),
            Script(),
            deliver=lambda reply: (
                [reply, reply] if reply.metadata.message_type == "train" else [reply]
            ),
        )
    )
    record = state.history[1]
    assert torch.equal(state.params["b"], torch.full((3,), 1.5))
    assert [reply["client"] for reply in record["replies"]] == ["client-0", "client-1"]
    assert {refusal["reason"] for refusal in record["refused"]} == {"not asked, or answered twice"}
    assert record["tokens"] == 200


@pytest.mark.parametrize("stranger", [5, 77], ids=["not-sampled", "unknown-node"])
def test_an_answer_of_a_client_that_was_not_asked_is_refused(stranger: int) -> None:
    """One of four clients is asked; its answer arrives under another node id as well."""

    def deliver(reply: Message) -> Iterable[Message]:
        yield reply
        if reply.metadata.message_type == "train":
            twin = copy.copy(reply)
            vars(twin)["_metadata"] = copy.copy(reply.metadata)
            vars(twin.metadata)["_src_node_id"] = stranger
            yield twin

    script = Script()
    run = server_run(4, num_rounds=1, fraction_train=0.25, seed=3)
    record = result_of(serve(run, script, deliver=deliver)).history[1]
    assert len(script.tasks) == len(record["replies"]) == 1
    (refused,) = record["refused"]
    assert refused["node"] == stranger
    assert refused["reason"] == "not asked, or answered twice"


@pytest.mark.parametrize(
    ("min_replies", "asked", "needed"),
    [
        (None, 4, 4),
        ("3", 4, 3),
        ("1", 4, 1),
        ("0.5", 4, 2),
        ("0.5", 5, 3),
        ("0.01", 5, 1),
        ("1.0", 5, 5),
        (".3", 10, 3),
        ("0.7", 10, 7),
        ("0.1", 30, 3),
    ],
)
def test_needed_replies(min_replies: str | None, asked: int, needed: int) -> None:
    assert needed_replies(min_replies, asked) == needed


@pytest.mark.parametrize(
    ("min_replies", "bad", "fails"),
    [
        (None, 1, True),
        ("3", 1, False),
        ("3", 2, True),
        ("0.5", 2, False),
        ("0.5", 3, True),
    ],
)
def test_too_few_good_updates_fail_the_round(min_replies: str, bad: int, fails: bool) -> None:
    script = Script({f"client-{k}": raising for k in range(bad)})
    run = serve(server_run(4, min_replies=min_replies, num_rounds=1, max_failed_rounds=0), script)
    assert (run.error is not None) == fails
    if fails:
        with pytest.raises(RoundError, match=rf"round 1 failed 1 times: {4 - bad} of \d needed"):
            result_of(run)


def failing_at(number: int, *attempts: int) -> Answer:
    """Raises in these attempts of a round."""

    def answer(content: RecordDict, task: RoundTask) -> RecordDict:
        if task.round == number and task.attempt in attempts:
            raise RuntimeError("down")
        return content

    return answer


def test_a_failed_round_keeps_the_model_and_is_tried_again(tmp_path: Path) -> None:
    """Round 2 of 3 fails twice; the third attempt starts from the model of round 1."""
    script = Script({"client-0": failing_at(2, 1, 2)})
    store = RunStore(tmp_path, num_rounds=3, save_every_rounds=1)
    state = result_of(serve(server_run(2, on_round=store.on_round), script))
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(line["round"], line["attempt"]) for line in lines] == [(1, 1), (2, 3), (3, 1)]
    assert lines == state.history[1:]
    assert [len(line["failed_attempts"]) for line in lines] == [0, 2, 0]
    failed = lines[1]["failed_attempts"][0]
    assert failed["reason"].startswith("1 of 2 needed updates (client-0: client failed")
    assert [refusal["client"] for refusal in failed["refused"]] == ["client-0"]
    assert lines[1]["refused"] == []
    # each round adds (1 + 2) / 2; the two failed attempts add nothing
    assert torch.equal(state.params["b"], torch.full((3,), 4.5))
    assert script.evaluated == [0.0, 1.5, 3.0, 4.5]
    asked = [(t.round, t.attempt, t.resume_round) for name, t in script.tasks if name == "client-1"]
    assert asked == [(1, 1, 0), (2, 1, 1), (2, 2, 1), (2, 3, 1), (3, 1, 2)]
    # what failed attempts moved was moved
    assert lines[1]["bytes_down"] > 2.9 * lines[0]["bytes_down"]
    # good rounds move the same, up to a longer list of rounds to keep
    assert lines[1]["samples"] - lines[0]["samples"] == 20


def test_another_attempt_asks_another_sample() -> None:
    """Whoever was asked first in round 1 fails; a later sample of 3 of 9 does without."""
    script = Script()
    down = set(sample_clients([f"client-{k}" for k in range(9)], 3, "42/1/1")[:1])
    for name in down:
        script.answers[name] = raising
    run = server_run(9, fraction_train=1 / 3, num_rounds=1, max_failed_rounds=20)
    record = result_of(serve(run, script)).history[1]
    assert record["attempt"] > 1
    assert down.isdisjoint(reply["client"] for reply in record["replies"])
    first = {name for name, task in script.tasks if task.attempt == 1}
    last = {name for name, task in script.tasks if task.attempt == record["attempt"]}
    assert first != last


def test_a_run_that_keeps_failing_ends_with_the_last_good_adapter(tmp_path: Path) -> None:
    script = Script({"client-1": failing_at(2, *range(1, 10))})
    store = RunStore(tmp_path, num_rounds=3, save_every_rounds=1)
    run = serve(server_run(2, on_round=store.on_round, max_failed_rounds=2), script)
    with pytest.raises(RoundError, match="round 2 failed 3 times.*client-1.*--min_replies"):
        result_of(run)
    assert {task.attempt for _, task in script.tasks if task.round == 2} == {1, 2, 3}
    params, _, _ = load_exported(tmp_path / "adapter")
    assert torch.equal(params["b"], torch.full((3,), 1.5))
    state = load_latest(tmp_path / "checkpoints")
    assert state is not None
    assert (state.round, len(state.history)) == (1, 2)
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 1


def test_a_network_that_swallows_answers_runs_into_the_time_limit() -> None:
    def deliver(reply: Message) -> Iterable[Message]:
        lost = reply.metadata.message_type == "train" and reply.metadata.src_node_id == 3
        return [] if lost else [reply]

    run = server_run(3, min_replies="2", num_rounds=1, round_timeout_s=0.2)
    record = result_of(serve(run, Script(), deliver=deliver)).history[1]
    assert [(item["client"], item["reason"]) for item in record["refused"]] == [
        ("client-1", "no reply within the round's time limit")
    ]
    assert 0.2 <= record["wall_s"] < 2
    assert record["samples"] == 20


def test_a_lost_client_is_named_though_the_server_answers_in_its_place() -> None:
    def deliver(reply: Message) -> Iterable[Message]:
        if reply.metadata.message_type != "train" or reply.metadata.src_node_id != 3:
            return [reply]
        answer = client_failed(reply, RuntimeError("node unavailable"))
        vars(answer.metadata)["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        assert answer.metadata.src_node_id != 3
        return [answer]

    run = server_run(3, min_replies="2", num_rounds=1)
    record = result_of(serve(run, Script(), deliver=deliver)).history[1]
    assert [(item["node"], item["client"], item["reason"]) for item in record["refused"]] == [
        (3, "client-1", "node unavailable")
    ]


def without(kind: str) -> Callable[[Message], Iterable[Message]]:
    """A network that swallows every answer of a kind."""
    return lambda reply: [] if reply.metadata.message_type == kind else [reply]


def test_clients_that_never_answer_end_the_run() -> None:
    run = server_run(2, num_rounds=1, round_timeout_s=0.1, max_failed_rounds=1)
    with pytest.raises(RoundError, match="round 1 failed 2 times: 0 of 2 needed.*time limit"):
        result_of(serve(run, Script(), deliver=without("train")))


def test_an_evaluation_that_never_answers_ends_the_run() -> None:
    run = server_run(2, num_rounds=1, round_timeout_s=0.1)
    with pytest.raises(RoundError, match="evaluation of round 0 failed: no client answered"):
        result_of(serve(run, Script(), deliver=without("evaluate")))


@pytest.mark.parametrize("loss", [NAN, INF])
def test_a_global_model_without_a_finite_loss_ends_the_run(tmp_path: Path, loss: float) -> None:
    """Finite parameters can still overflow in the model; the round before stays in place."""
    script = Script(eval_loss=lambda params: loss if params["b"][0] > 2 else 1.0)
    store = RunStore(tmp_path, num_rounds=3, save_every_rounds=1)
    run = serve(server_run(2, on_round=store.on_round), script)
    with pytest.raises(RoundError, match="eval_loss: expected a finite number"):
        result_of(run)
    state = load_latest(tmp_path / "checkpoints")
    assert state is not None
    assert state.round == 1
    assert torch.equal(load_exported(tmp_path / "adapter")[0]["b"], torch.full((3,), 1.5))


@pytest.mark.parametrize(
    ("losses", "best"),
    [([4.0, 3.0, 1.0, 2.0], 2), ([1.0, 3.0, 1.0, 2.0], 0), ([4.0, 1.0, 1.0, 2.0], 1)],
    ids=["a round", "no round", "the first of two"],
)
def test_best_is_the_lowest_loss(tmp_path: Path, losses: list[float], best: int) -> None:
    """And the initial adapter where no round beat it; each round adds 1.5 to the parameters."""
    script = Script(eval_loss=lambda params: losses[round(float(params["b"][0]) / 1.5)])
    store = RunStore(tmp_path, num_rounds=3, save_every_rounds=1)
    state = result_of(serve(server_run(2, on_round=store.on_round), script))
    assert eval_losses(state) == losses
    assert state.best == {"round": best, "eval_loss": losses[best]}
    assert torch.equal(load_exported(tmp_path / "best")[0]["b"], torch.full((3,), 1.5 * best))
    assert torch.equal(load_exported(tmp_path / "adapter")[0]["b"], torch.full((3,), 4.5))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75, 1.0])
def test_sampling(fraction: float) -> None:
    """Rounded share of the clients, at least one, the same for a seed, another every round."""
    asked: dict[int, list[dict[int, list[str]]]] = {}
    for seed in (1, 1, 2):
        script = Script()
        result_of(serve(server_run(4, fraction_train=fraction, num_rounds=8, seed=seed), script))
        rounds: dict[int, list[str]] = {}
        for name, task in script.tasks:
            rounds.setdefault(task.round, []).append(name)
        asked.setdefault(seed, []).append(rounds)
    first, again = asked[1]
    assert first == again
    assert {len(names) for names in first.values()} == {max(1, math.floor(4 * fraction + 0.5))}
    if fraction < 1:
        assert len({tuple(names) for names in first.values()}) > 1
        assert first != asked[2][0]


def test_a_sample_does_not_depend_on_the_order_of_names() -> None:
    names = [f"client-{k}" for k in range(20)]
    assert sample_clients(names, 7, "k") == sample_clients(reversed(names), 7, "k")
    assert sample_clients(names, 20, "k") == sorted(names)


def test_clients_with_the_same_name_are_noticed() -> None:
    """Every node calls itself client-0."""
    script = Script(set_up_as="client-0")
    with pytest.raises(RoundError, match="another connected client is called client-0"):
        result_of(serve(server_run(2), script))
