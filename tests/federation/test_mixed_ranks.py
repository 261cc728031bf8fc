"""Clients of different LoRA ranks in whole federations, arms of the comparison included."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import concatenate_datasets
from flwr.app import Message
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedtune.adapters import collect, describe, export_adapter, load_exported
from fedtune.client.replies import Sent
from fedtune.client.worker import Worker
from fedtune.compare.arms import ArmInput, run_arm
from fedtune.compare.plain import run_plain
from fedtune.config import ARMS, Arguments
from fedtune.engines.inline import InlineGrid
from fedtune.run.federate import federate, federate_control
from fedtune.server.store import RunStore
from fedtune.strategies import build_method
from fedtune.strategies.lora.manifests import ranks_in
from fedtune.strategies.lora.padding import cut, widen
from fedtune.transport.messages import TRAIN, RoundTask
from fedtune.transport.records import params_of
from tests.federation.small import (
    STEPS,
    arguments,
    build_trainer,
    eval_losses,
    run_on,
    same_tensors,
    small_rows,
    training_arguments,
)
from tests.tiny import tiny_llama

RANKS = {"client-0": 2, "client-1": 4, "client-2": 8}
ROUNDS = 4
METHODS = {
    "flora": {},
    "flexlora": {},
    "flexlora, energy": {"energy": 0.9},
    "hetlora": {},
    "raflora": {},
}


def build_model(args: Arguments) -> tuple[nn.Module, None]:
    """A tiny Llama with LoRA as the settings have it."""
    config = LoraConfig(
        r=args.adapter.lora_r,
        lora_alpha=args.adapter.lora_alpha,
        use_rslora=args.adapter.use_rslora,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    base = tiny_llama(1)
    torch.manual_seed(args.training.seed)
    return get_peft_model(base, config), None


def build_double(args: Arguments) -> tuple[nn.Module, None]:
    return build_model(args)[0].double(), None


def worker(
    directory: Path,
    ranks: dict[str, int] | None = None,
    *,
    own: int = 4,
    rslora: bool = False,
    build: Any = build_model,
    federation: dict[str, Any] | None = None,
    **training: Any,
) -> Worker:
    """Clients of these ranks, or client-0 alone whose model has rank `own`; s is 2 at rank 4."""
    given = {"lr_scheduler_type": "constant", "warmup_steps": 0, **training}
    args = arguments(
        training_arguments(directory, **given), **{"num_rounds": ROUNDS, **(federation or {})}
    )
    adapter = replace(args.adapter, lora_r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=rslora)
    adapter = adapter.at_rank(max(ranks.values()) if ranks else own)
    named = ",".join(map(str, ranks.values())) if ranks else None
    args.adapter = replace(adapter, client_ranks=named)
    train = {name: small_rows(13, seed=k) for k, name in enumerate(ranks or ["client-0"])}
    held_out = concatenate_datasets(list(train.values()))  # random rows teach nothing of others
    return Worker(build, build_trainer, args, train, held_out, directory)


# A client of rank 2 in a live adapter of rank 8, against one whose model has rank 2.

OPTIMIZERS = {
    "sgd": {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0},
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.3, "max_grad_norm": 0.0},
    "clipped": {"optim": "adamw_torch", "weight_decay": 0.3, "max_grad_norm": 0.01},
}


def two_rounds(worker: Worker, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """client-0 goes on from its own update."""
    params, losses = start, []
    for number in (1, 2):
        task = RoundTask(
            run="1", round=number, num_rounds=2, attempt=1, seed=42, carry=True,
            manifest=worker.manifest_of("client-0").hash, steps=STEPS, epochs=0.0,
            resume_round=number - 1,
        )  # fmt: skip
        result = worker.train_round("client-0", task, Sent(params))
        params = result.params
        losses.append(result.train_loss)
    return params, losses


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_padded_client_trains_like_one_of_its_own_rank(
    optimizer: str, rslora: bool, tmp_path: Path
) -> None:
    given = {"build": build_double, "rslora": rslora, **OPTIMIZERS[optimizer]}
    inside = worker(tmp_path / "inside", {"client-0": 2, "client-1": 8}, **given)
    alone = worker(tmp_path / "alone", own=2, **given)
    assert inside.manifest_of("client-0").hash == alone.manifest.hash
    start = {n: t + 0.01 for n, t in alone.initial()[0].items()}
    padded, losses = two_rounds(inside, start)
    plain, expected = two_rounds(alone, start)
    # fp64; products of other shapes add in another order. 8 steps of Adam divide by the size of the
    # gradient, so that its rounding counts relative to the smallest gradients.
    assert losses == pytest.approx(expected, rel=1e-12)
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-9, atol=1e-11)
        assert float((value - start[name]).abs().max()) > 1e-4
    live = collect(inside.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
    small = {name: tuple(tensor.shape) for name, tensor in plain.items()}
    assert ranks_in(live) == dict.fromkeys(ranks_in(live), 8)
    assert same_tensors(live, widen(cut(live, small), shapes))  # the others are exactly 0


# Whole federations.


class Counted(InlineGrid):
    """Notes how many values each client received and sent for every `train`."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        outgoing = list(messages)
        for message in outgoing:
            if message.metadata.message_type == TRAIN:
                DOWN.append((message.metadata.dst_node_id, values(message)))
        return super().push_messages(outgoing)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for message in replies:
            if message.metadata.message_type == TRAIN:
                UP.append((message.metadata.src_node_id, values(message)))
        return replies


DOWN: list[tuple[int, int]] = []
UP: list[tuple[int, int]] = []


def values(message: Message) -> int:
    return sum(t.numel() for t in params_of(message.content.array_records["arrays"]).values())


@pytest.mark.parametrize("name", METHODS)
def test_a_federation(name: str, tmp_path: Path) -> None:
    """Two of three are asked: the largest client is sometimes not among them."""
    DOWN.clear()
    UP.clear()
    method = build_method(name.split(",")[0], weight_by="tokens", settings=METHODS[name])
    clients = worker(tmp_path, RANKS, learning_rate=0.03)
    given = {"fraction_train": 0.67, "num_rounds": ROUNDS, "steps": 12}
    state = run_on(clients, Counted, method=method, **given)
    losses = eval_losses(state)
    assert losses[-1] < losses[0] - 0.02
    asked = [{reply["client"] for reply in record["replies"]} for record in state.history[1:]]
    assert any("client-2" not in names for names in asked)
    assert any("client-2" in names for names in asked)

    # All that travels is LoRA: what a client sends and receives is proportional to its rank.
    one = {count / RANKS[f"client-{node - 2}"] for node, count in DOWN + UP}
    assert len(one) == 1
    assert len(DOWN) == len(UP) == 2 * ROUNDS

    found = set(ranks_in(state.params).values())
    if name == "flexlora, energy":
        assert max(found) < 8
    else:
        assert found == {8}
    for record in state.history[1:]:
        residual, plain = record["residual"], record["residual_fedavg"]
        assert plain > 0.01
        if name == "flora":
            assert 0 <= residual < 1e-6  # fp64 but for the rounding of the terms' sum to fp32
        elif name == "flexlora":
            assert 0 <= residual < plain
        elif name == "flexlora, energy":
            assert residual <= 0.1**0.5 + 1e-6  # a tenth of the squares is left out at most; fp32
        else:
            assert residual > 0.01

    whole, manifest = state.whole()
    export_adapter(tmp_path / "adapter", whole, state.static, manifest)
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "adapter")
    trainer = build_trainer(clients.args, loaded, None, small_rows(), clients.evaluation)
    # fp32: base and adapter add in another order.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1], rel=1e-5)


def federated(directory: Path, strategy: str, *, resume: bool = False, **federation: Any) -> Worker:
    """A durable run in `directory`."""
    given = {"strategy": strategy, "num_clients": 3, "fraction_train": 0.67, **federation}
    clients = worker(directory / "clients", RANKS, federation=given)
    clients.args.run.resume = resume
    federate(clients.args, clients, directory)
    return clients


@pytest.mark.parametrize("strategy", ["flora", "hetlora"])
def test_a_resumed_run_is_the_run(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federated(tmp_path / "whole", strategy)
    on_round = RunStore.on_round

    def interrupt(store: RunStore, state: Any, record: dict[str, Any]) -> None:
        on_round(store, state, record)
        if record["round"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "on_round", interrupt)
        with pytest.raises(KeyboardInterrupt):
            federated(tmp_path / "torn", strategy)
    federated(tmp_path / "torn", strategy, resume=True)
    left, right = (load_exported(tmp_path / name / "adapter") for name in ("whole", "torn"))
    assert same_tensors(left[0], right[0])
    assert left[2].to_json() == right[2].to_json()


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'fedtune[ray]'"
)
def test_ray_is_inline(tmp_path: Path) -> None:
    for engine in ("inline", "ray"):
        federated(tmp_path / engine, "flexlora", engine=engine)
    left, right = (load_exported(tmp_path / name / "adapter") for name in ("inline", "ray"))
    assert same_tensors(left[0], right[0])


def test_the_arms_of_a_comparison(tmp_path: Path) -> None:
    """Clients alone have their own rank; the others that of the largest client."""
    federation = {"strategy": "flexlora", "num_clients": 3, "num_rounds": 2}
    clients = worker(tmp_path / "clients", RANKS, federation=federation)
    first, last = federate(clients.args, clients, tmp_path)
    control = partial(federate_control, clients.args)
    given = ArmInput(clients.args, clients, first, last.history, tmp_path / "arms", control)
    arms = {name: run_arm(name, given) for name in ARMS}
    assert (arms["parity"]["identical"], arms["parity"]["rounds"]) == (True, 2)
    assert len(set(arms["fixed_global"]["eval_loss"])) == 1
    starts = {arm["eval_loss"][0] for name, arm in arms.items()}
    assert max(starts) - min(starts) < 1e-6
    for name in ARMS:
        params, _, manifest = load_exported(tmp_path / "arms" / name / "adapter")
        assert set(ranks_in(params).values()) == {8}
        assert manifest.hash == describe(clients.model).hash
    assert local_losses(arms["local"], "client-0") == pytest.approx(
        plain_losses(worker(tmp_path / "alone", own=2), clients, given.built.params), rel=1e-5
    )  # fp32: products of other shapes add in another order


def local_losses(arm: dict[str, Any], client: str) -> list[float]:
    (found,) = (row["eval_loss"] for row in arm["clients"] if row["client"] == client)
    return found


def plain_losses(alone: Worker, clients: Worker, params: dict[str, Tensor]) -> list[float]:
    """client-0 trains a model that was built at its rank, on its own."""
    shapes = {name: entry.shape for name, entry in alone.manifest.entries.items()}
    trainer = alone.new_trainer(alone.train["client-0"], clients.evaluation, "plain")
    marks, own = [STEPS, 2 * STEPS], cut(params, shapes)
    run = run_plain(trainer, own, alone.manifest, max_steps=marks[-1], marks=marks, mark_by="steps")
    return [record.eval_loss for record in run.history]
