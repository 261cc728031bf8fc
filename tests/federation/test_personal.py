"""What stays with a client: scored by its owner, exported per client, rolled back when refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from fedtune.adapters import collect
from fedtune.client.client_round import ClientRound
from fedtune.client.worker import Worker
from fedtune.errors import ManifestError
from fedtune.run.federate import _personal
from fedtune.server.checkpoint import ServerState
from fedtune.server.store import RunStore
from fedtune.strategies import Method
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.lora.fedsa_lora import MeanWithoutB
from tests.federation.small import run_small, same_tensors, small_worker
from tests.tiny import tiny_llama

FEDSA = LORA_RULES["fedsa_lora"]


def run(worker: Worker, directory: Path, **given: Any) -> ServerState:
    method = Method(FEDSA())
    store = RunStore(
        directory,
        num_rounds=3,
        save_every_rounds=1,
        personal=partial(_personal, method, worker),
    )
    return run_small(worker, method=method, on_round=store.on_round, steps=2, **given)


def loss_of(worker: Worker, adapter: Path) -> float:
    """On the held-out rows, in plain PEFT."""
    model = PeftModel.from_pretrained(tiny_llama(1), str(adapter)).eval()
    ids = torch.tensor(worker.evaluation["input_ids"])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def b_of(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in params.items() if "lora_B" in name}


def a_of(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in params.items() if "lora_A" in name}


def test_the_score_is_the_mean_of_the_personal_ones(tmp_path: Path) -> None:
    """client-2 is never asked in time to have a B of its own: it is scored with the global one."""
    worker = small_worker(tmp_path / "clients", clients=3)
    state = run(worker, tmp_path / "run", num_rounds=2, fraction_train=0.4)
    trained = sorted(state.client_rounds)
    assert 1 <= len(trained) < 3
    own = {
        path.name: loss_of(worker, path) for path in (tmp_path / "run/adapter/clients").iterdir()
    }
    assert sorted(own) == trained
    absent = loss_of(worker, tmp_path / "run/adapter")
    losses = {name: own.get(name, absent) for name in worker.train}
    # 1e-6: fp32 sums in another order
    last = state.history[-1]
    assert last["eval_loss"] == pytest.approx(sum(losses.values()) / 3, rel=1e-6)
    assert {row["client"]: row["eval_loss"] for row in last["eval_clients"]} == pytest.approx(
        losses, rel=1e-6
    )
    assert len(set(losses.values())) > 1
    assert len(set(record["eval_loss"] for record in state.history)) == 3  # noqa: C401
    assert last["residual"] is last["residual_fedavg"] is None


def test_only_a_travels(tmp_path: Path) -> None:
    """Down too, once a client has its own B; A is equal in all exports, B is not."""
    worker = small_worker(tmp_path / "clients", clients=2)
    state = run(worker, tmp_path / "run", num_rounds=3)
    a_bytes, b_bytes = (
        2 * sum(4 * tensor.numel() for tensor in pick(state.params).values())
        for pick in (a_of, b_of)
    )
    frame = 2 * 400 * len(state.params)
    for record in state.history[1:]:
        assert 0 < record["bytes_up"] - a_bytes < frame
        down = record["bytes_down"] - a_bytes - (b_bytes if record["round"] == 1 else 0)
        assert 0 < down < frame
    files = [
        load_file(tmp_path / "run/adapter/clients" / name / "adapter_model.safetensors")
        for name in worker.train
    ]
    assert same_tensors(a_of(files[0]), a_of(files[1]))
    assert same_tensors(a_of(files[0]), a_of(state.params))
    assert not any(torch.equal(value, files[1][name]) for name, value in b_of(files[0]).items())


class Watch:
    """B of one client when its rounds begin and end."""

    def __init__(self, worker: Worker, client: str, patch: pytest.MonkeyPatch) -> None:
        self.began: list[dict[str, Tensor]] = []
        self.ended: list[dict[str, Tensor]] = []
        self.now = ""
        train_round, load = worker.train_round, ClientRound.load

        def watched(name: str, task: Any, sent: Any) -> Any:
            self.now = name
            result = train_round(name, task, sent)
            if name == client:
                self.ended.append(b_of(collect(worker.model)))
                self.after(task)
            return result

        def loading(this: ClientRound, model: Any) -> None:
            load(this, model)
            if self.now == client:
                self.began.append(b_of(collect(model)))

        patch.setattr(ClientRound, "load", loading)
        worker.train_round = watched  # type: ignore[method-assign]

    def after(self, task: Any) -> None:
        """When a round has been trained."""


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("how", ["reply", "fold"])
def test_a_refused_update_takes_its_b_back(
    how: str, carry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused in round 2: round 3 begins with the B of round 1, and so is it scored till then."""
    worker = small_worker(tmp_path / "clients", clients=2)
    watch = Watch(worker, "client-1", monkeypatch)
    bad: list[bool] = []

    def after(task: Any) -> None:
        bad[:] = [task.round == 2]
        if bad[0] and how == "reply":
            raise RuntimeError("killed before it could answer")

    watch.after = after  # type: ignore[method-assign]
    add = MeanWithoutB.add

    def refusing(fold: MeanWithoutB, params: Mapping[str, Tensor], weight: float) -> None:
        if watch.now == "client-1" and bad[0] and how == "fold":
            raise ManifestError("not this one")
        add(fold, params, weight)

    monkeypatch.setattr(MeanWithoutB, "add", refusing)
    state = run(worker, tmp_path / "run", num_rounds=3, min_replies="1", carry=carry)
    assert [len(record["refused"]) for record in state.history[1:]] == [0, 1, 0]
    assert state.client_rounds == {"client-0": 3, "client-1": 3}
    first, second, third = watch.began
    assert not any(value.any() for value in first.values())
    assert same_tensors(second, watch.ended[0])
    assert same_tensors(third, watch.ended[0])
    assert not same_tensors(watch.ended[1], watch.ended[0])
    kept = load_file(tmp_path / "run/adapter/clients/client-1/adapter_model.safetensors")
    assert same_tensors(b_of(kept), watch.ended[2])


def test_a_repeated_round_begins_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All replies are needed: round 2 is trained twice, from the same B."""
    worker = small_worker(tmp_path / "clients", clients=2)
    watch = Watch(worker, "client-0", monkeypatch)
    attempts: list[int] = []

    def after(task: Any) -> None:
        attempts.append(task.round)
        if attempts.count(2) == 1 and task.round == 2:
            raise RuntimeError("out of memory")

    watch.after = after  # type: ignore[method-assign]
    state = run(worker, tmp_path / "run", num_rounds=3)
    assert attempts == [1, 2, 2, 3]
    assert same_tensors(watch.began[2], watch.began[1])
    assert same_tensors(watch.began[3], watch.ended[2])
    calm = run(small_worker(tmp_path / "calm", clients=2), tmp_path / "calm-run", num_rounds=3)
    assert same_tensors(state.params, calm.params)
