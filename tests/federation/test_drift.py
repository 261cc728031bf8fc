"""FedProx and SCAFFOLD in whole federations of real Trainers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor
from transformers import Trainer

from fedtune.client.local import MEMORY
from fedtune.client.memory import ClientMemory
from fedtune.client.worker import Worker
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import FedAvg, Method, build_method
from fedtune.strategies.fedprox import FedProx
from fedtune.strategies.scaffold import Scaffold
from fedtune.transport.messages import RoundTask
from fedtune.transport.records import params_of, to_arrays
from tests.federation.quadratic import quadratic_worker, recursion
from tests.federation.scripted import Script, serve
from tests.federation.small import (
    ROUNDS,
    eval_losses,
    result_of,
    run_on,
    run_small,
    same_tensors,
    server_run,
    small_worker,
)
from tests.federation.test_client_state import refusing

Tensors = dict[str, Tensor]
UNIFORM = Method(FedAvg(weight_by="uniform"), Scaffold())


@pytest.mark.parametrize("steps", [(10, 10), (10, 2)])
@pytest.mark.parametrize(
    ("method", "given", "limits"),
    [
        (FedAvg(weight_by="uniform"), {}, {(10, 10): 0.713442, (10, 2): 0.651458}),
        (Method(FedAvg(weight_by="uniform"), FedProx(mu=1.0)), {"mu": 1.0}, {}),
        (UNIFORM, {"control": True}, {(10, 10): 10 / 11, (10, 2): 10 / 11}),
    ],
    ids=["fedavg", "fedprox", "scaffold"],
)
def test_every_round_is_that_of_the_recursion(
    tmp_path: Path,
    method: Method,
    given: dict[str, Any],
    limits: dict[tuple[int, int], float],
    steps: tuple[int, int],
) -> None:
    """In fp64: 1e-12 is the rounding of 8 rounds of 10 steps on numbers below 10.

    Where the recursion stays is known in closed form; FedProx: a_k = h_k / (h_k + mu) (1 - (1 -
    rate (h_k + mu))^steps), and sum a_k b_k / sum a_k.
    """
    rounds, found = 8, []
    run_small(
        quadratic_worker(tmp_path, steps),
        method=method,
        num_rounds=rounds,
        steps=0,
        epochs=1.0,
        carry=False,
        on_round=lambda state, record: found.append(state.params["y"].item()),
    )
    assert found[1:] == pytest.approx(recursion(steps, rounds, **given), abs=1e-12)
    a = [h / (h + 1) * (1 - (1 - 0.05 * (h + 1)) ** s) for h, s in zip((1, 10), steps, strict=True)]
    limit = limits.get(steps, a[1] / sum(a))
    assert recursion(steps, 200, **given)[-1] == pytest.approx(limit, abs=1e-6)  # 6 digits quoted


@pytest.mark.parametrize("method", [FedProx(mu=0.0), Scaffold()], ids=["mu=0", "one client"])
def test_what_corrects_nothing_is_fedavg_to_the_bit(tmp_path: Path, method: Method) -> None:
    """With one client c is c_k to the last bit, so that nothing is added."""
    clients = 2 if isinstance(method, FedProx) else 1
    plain = run_small(small_worker(tmp_path / "plain", clients=clients), method=FedAvg())
    state = run_small(small_worker(tmp_path / "other", clients=clients), method=method)
    assert same_tensors(state.params, plain.params)
    assert eval_losses(state) == eval_losses(plain)


@pytest.mark.parametrize("method", ["fedprox", "scaffold"])
def test_a_correction_changes_the_training(tmp_path: Path, method: str) -> None:
    """Or the tests beside this one compare nothing."""
    plain = run_small(small_worker(tmp_path / "plain", clients=2), method=FedAvg())
    built = build_method(method, weight_by="tokens", settings={})
    state = run_small(small_worker(tmp_path / "other", clients=2), method=built)
    assert not same_tensors(state.params, plain.params)


def controls(state: ServerState) -> Tensors:
    return {name: kept["control"] for name, kept in state.method_state.items()}


def own_controls(worker: Worker, client: str, number: int) -> Tensors:
    return dict(ClientMemory(worker.work_dir / client / MEMORY).read(number).control)


@pytest.mark.parametrize("carry", [True, False])
def test_the_servers_control_is_the_mean_of_the_clients(tmp_path: Path, carry: bool) -> None:
    """Up to an fp32 rounding of the largest value at each client and the server, every round."""
    worker = small_worker(tmp_path, clients=3)
    state = run_small(worker, method=UNIFORM, carry=carry)
    own = [own_controls(worker, name, ROUNDS) for name in worker.names]
    assert controls(state).keys() == state.params.keys()
    for name, value in controls(state).items():
        mean = sum(one[name].double() for one in own) / 3
        largest = max(float(one[name].abs().max()) for one in own)
        bound = ROUNDS * 2 * 2**-23 * largest
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=bound)
    assert max(float(value.abs().max()) for value in controls(state).values()) > 1e-3


def test_absent_clients_keep_their_part_of_the_control(tmp_path: Path) -> None:
    """Two of four in a round: c moves by 2/4 of the mean change; 1e-8 as above."""
    worker = small_worker(tmp_path, clients=4)
    seen: list[Tensors] = []
    kept: list[dict[str, Tensors]] = [{}]

    def look(state: ServerState, record: dict[str, Any]) -> None:
        seen.append(controls(state))
        if state.round:
            asked = [reply["client"] for reply in record["replies"]]
            assert len(asked) == 2
            new = {client: own_controls(worker, client, state.round) for client in asked}
            kept.append({**kept[-1], **new})

    run_small(worker, method=UNIFORM, num_rounds=4, fraction_train=0.5, on_round=look)
    for (before, after), (old, new) in zip(pairwise(seen), pairwise(kept), strict=True):
        for name, value in after.items():
            change = sum(
                (new[client][name] - old.get(client, {}).get(name, torch.zeros(())))
                for client in new
                if new[client] is not old.get(client)
            )
            expected = before.get(name, torch.zeros(())) + 2 / 4 * change / 2
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-8)
    assert len(kept[-1]) > 2  # or nobody was ever absent


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_repeated_round_leaves_every_control_as_it_was(tmp_path: Path, number: int) -> None:
    calm, failing = (small_worker(tmp_path / name, clients=2) for name in ("calm", "failing"))
    expected = run_small(calm, method=Scaffold())
    state = run_on(failing, refusing(1, number, range(1, 3)), method=Scaffold())
    assert [record.get("attempt", 1) for record in state.history].count(3) == 1
    assert same_as(state, expected)
    for name in calm.names:
        left, right = (own_controls(worker, name, ROUNDS) for worker in (calm, failing))
        assert same_tensors(left, right)


def test_nan_of_one_client_is_rolled_back(tmp_path: Path) -> None:
    """Its first attempt of round 2 trains NaN into parameters and control; the second is clean."""
    bad = [True]

    class OnceNaN(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 5 and "client-1" in str(self.args.output_dir) and bad:
                bad.pop()
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("nan"))
            return loss

    def build(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Trainer:
        return OnceNaN(model, args.training, train_dataset=train, eval_dataset=evaluation)

    worker = small_worker(tmp_path / "failing", clients=2, build_trainer=build)
    state = run_small(worker, method=Scaffold())
    (failure,) = state.history[2]["failed_attempts"]
    assert "not finite" in failure["reason"]
    assert same_as(state, run_small(small_worker(tmp_path / "calm", clients=2), method=Scaffold()))


def same_as(state: ServerState, expected: ServerState) -> bool:
    return same_tensors(state.params, expected.params) and same_tensors(
        controls(state), controls(expected)
    )


# What travels.


def with_control(content: RecordDict, **tensors: Tensor | None) -> RecordDict:
    """The reply with a control of ones like its parameters, but for `tensors`; None: without."""
    params = params_of(content["arrays"])  # type: ignore[arg-type]
    control = {name: torch.ones_like(tensor) for name, tensor in params.items()} | tensors
    content["control"] = to_arrays({n: t for n, t in control.items() if t is not None})
    return content


def good(content: RecordDict, task: RoundTask) -> RecordDict:
    return with_control(content)


BAD: dict[str, tuple[Any, str]] = {
    "none": (lambda content, task: content, "`a` is missing"),
    "a name less": (lambda content, task: with_control(content, b=None), "`b` is missing"),
    "a name more": (lambda content, task: with_control(content, c=torch.ones(1)), "`c`"),
    "shape": (lambda content, task: with_control(content, b=torch.ones(4)), "wrong shape"),
    "NaN": (lambda content, task: with_control(content, b=torch.ones(3) / 0 * 0), "not finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_control_is_refused_and_folded_into_nothing(what: str) -> None:
    """Only client 0 counts: it adds 1 to the parameters, and 1/2 of its 1 is the new c."""
    answer, reason = BAD[what]
    script = Script(answers={"client-0": good, "client-1": answer})
    run = server_run(2, method=Scaffold(), min_replies="1", num_rounds=1)
    state = result_of(serve(run, script))
    (refusal,) = state.history[1]["refused"]
    assert refusal["client"] == "client-1"
    assert refusal["reason"].startswith("control variate: ")
    assert reason in refusal["reason"]
    assert all(torch.equal(value, torch.ones_like(value)) for value in state.params.values())
    for value in controls(state).values():
        assert torch.equal(value, torch.full_like(value, 0.5))


def test_a_good_control_is_folded() -> None:
    script = Script(answers={"client-0": good, "client-1": good})
    state = result_of(serve(server_run(2, method=Scaffold(), num_rounds=1), script))
    for value in controls(state).values():
        assert torch.equal(value, torch.ones_like(value))
