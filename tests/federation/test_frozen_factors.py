"""Rules that train one factor: it alone travels, and the other one does not move by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from fedtune.client.client_round import ClientRound
from fedtune.client.worker import Worker
from fedtune.server.store import RunStore
from fedtune.strategies.lora import LORA_RULES
from tests.federation.small import run_small, same_tensors, small_worker


@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_half_of_the_factors_travels(name: str, tmp_path: Path) -> None:
    """Sizes of the tensors; what is around them is less than 400 bytes a message and tensor."""
    full = run_small(small_worker(tmp_path / "fedavg", clients=2), num_rounds=2, steps=1)
    state = run_small(
        small_worker(tmp_path / name, clients=2), method=LORA_RULES[name](), num_rounds=2, steps=1
    )
    tensors = {**state.static, **state.params}
    size = {
        kind: 2 * sum(4 * t.numel() for n, t in tensors.items() if kind in n)
        for kind in ("lora_A", "lora_B")
    }
    frame = full.history[1]["bytes_up"] - sum(size.values())
    assert 0 < frame < 2 * 400 * len(tensors)
    for record in state.history[1:]:
        trained = "lora_A" if name == "rolora" and record["round"] == 2 else "lora_B"
        assert 0 < record["bytes_up"] - size[trained] <= frame
        down = record["bytes_down"] - (size["lora_B"] if name == "ffa_lora" else sum(size.values()))
        assert 0 < down < 2 * 400 * len(tensors)


class Frozen:
    """What clients do to the factors: which were sent, live values and `requires_grad` after."""

    def __init__(self, worker: Worker) -> None:
        self.after: list[set[str]] = []
        self.results: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = []
        train_round = worker.train_round

        def spy(client: str, task: Any, sent: Any) -> Any:
            result = train_round(client, task, sent)
            live = {
                n.replace(".default", ""): p.detach().clone()
                for n, p in worker.model.named_parameters()
                if "lora_" in n
            }
            self.results.append((client, task.round, {**sent.params}, live))
            self.after.append({n for n, p in worker.model.named_parameters() if p.requires_grad})
            return result

        worker.train_round = spy  # type: ignore[method-assign]


def test_ffa_holds_one_a_everywhere(tmp_path: Path) -> None:
    worker = small_worker(tmp_path / "clients", clients=2)
    start, _ = worker.initial()
    frozen = Frozen(worker)
    store = RunStore(tmp_path / "run", num_rounds=2, save_every_rounds=1)
    state = run_small(
        worker, method=LORA_RULES["ffa_lora"](), on_round=store.on_round, num_rounds=2, steps=2
    )
    first_a = {name: value for name, value in start.items() if "lora_A" in name}
    assert same_tensors(state.static, first_a)
    for _, _, _, live in frozen.results:
        assert same_tensors({name: live[name] for name in first_a}, first_a)
    files = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert same_tensors({name: files[name] for name in first_a}, first_a)
    assert all(any("lora_A" in name for name in names) for names in frozen.after)


def test_rolora_moves_one_factor_a_round(tmp_path: Path) -> None:
    worker = small_worker(tmp_path, clients=2)
    frozen = Frozen(worker)
    run_small(worker, method=LORA_RULES["rolora"](), num_rounds=3, steps=2)
    everything = {n for n, _ in worker.model.named_parameters() if "lora_" in n}
    assert all(names == everything for names in frozen.after)
    for client, number, sent, live in frozen.results:
        moved = {name[-8] for name in sent if not torch.equal(sent[name], live[name])}
        assert moved == ({"A"} if number == 2 else {"B"}), (client, number)


class WithReference(Trainer):
    """As DPOTrainer does it: in every step the model once without its adapter."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        return super().compute_loss(model, inputs, *args, **given)


@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_a_reference_does_not_unfreeze(name: str, tmp_path: Path) -> None:
    """PEFT switches an adapter on again with all of it trainable; clipping would count it too."""

    def build(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Trainer:
        return WithReference(
            model=model, args=args.training, train_dataset=train, eval_dataset=evaluation
        )

    states = [
        run_small(
            small_worker(tmp_path / part, dropout=0.0, max_grad_norm=0.01, **more),
            method=LORA_RULES[name](),
            num_rounds=2,
            steps=2,
        )
        for part, more in (("plain", {}), ("reference", {"build_trainer": build}))
    ]
    assert same_tensors(states[0].params, states[1].params)


@pytest.mark.parametrize(("name", "kept"), [("flora", 0), ("flexlora", 0), ("rolora", 4)])
def test_moments_of_other_factors_are_dropped(
    name: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's moments when round 2 begins: of new factors none, of RoLoRA those of its 4 Bs."""
    begin, found = ClientRound.begin, []

    def spy(this: ClientRound, model: Any, optimizer: Any) -> None:
        begin(this, model, optimizer)
        found.append(len(optimizer.state))

    monkeypatch.setattr(ClientRound, "begin", spy)
    run_small(small_worker(tmp_path), method=LORA_RULES[name](), num_rounds=2, steps=2)
    assert found == [0, kept]
