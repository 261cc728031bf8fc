"""How a run begins: enough clients, one adapter, the same frozen tensors everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from fedtune.adapters import Manifest, collect_static, export_adapter
from fedtune.client.worker import Worker
from fedtune.engines.inline import InlineGrid
from fedtune.errors import ConfigError, ManifestError, RoundError
from fedtune.server.checkpoint import ServerState
from tests.federation.scripted import MANIFEST, SHAPES, Script, first_params, serve
from tests.federation.small import (
    build_model,
    eval_losses,
    result_of,
    run_small,
    same_tensors,
    server_run,
    small_worker,
)
from tests.tiny import tiny_llama


def test_waiting_for_clients_has_an_end() -> None:
    class Late(InlineGrid):
        def get_node_ids(self) -> Iterable[int]:
            return list(super().get_node_ids())[:2]

    run = server_run(3)
    run.join_timeout_s = 0.1
    expected = r"expected 3 clients within 0 s, 2 are there \(client-0, client-1\)"
    with pytest.raises(RoundError, match=expected):
        result_of(serve(run, Script(), grid_type=Late))


def test_a_client_that_cannot_start_ends_the_run() -> None:
    class Broken(Script):
        def set_up(self, name: str) -> None:
            if name == "client-1":
                raise RuntimeError("no GPU\nhere")

    with pytest.raises(RoundError, match="a client could not start: .*no GPU here"):
        result_of(serve(server_run(2), Broken()))


def test_a_first_state_that_is_not_its_manifest_is_refused() -> None:
    script = Script(initial=lambda: {**first_params(), "b": torch.zeros(4)})
    with pytest.raises(ManifestError, match="`b` has the wrong shape"):
        result_of(serve(server_run(1), script))


def test_a_run_starts_from_an_adapter_on_disk(tmp_path: Path) -> None:
    params = {name: torch.full(shape, 7.0) for name, shape in SHAPES.items()}
    export_adapter(tmp_path / "adapter", params, {}, MANIFEST)
    run = server_run(2, num_rounds=1)
    run.init_adapter = tmp_path / "adapter"
    script = Script()
    state = result_of(serve(run, script))
    assert script.evaluated == [7.0, 8.5]
    assert torch.equal(state.params["a"], torch.full((2, 3), 8.5))


def test_a_client_with_another_adapter_refuses(tmp_path: Path) -> None:
    worker = small_worker(tmp_path)
    other = Manifest(**{**vars(worker.manifest), "base_hash": "another"})
    with pytest.raises(ManifestError, match="this client's adapter differs from the global one"):
        worker.set_up("client-0", other, {})


@pytest.mark.parametrize("given", ["both", "optimizer"])
def test_a_trainer_with_an_optimizer_of_its_own_is_refused(tmp_path: Path, given: str) -> None:
    def build(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Trainer:
        optimizer = torch.optim.SGD(model.parameters())
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer) if given == "both" else None
        return Trainer(model, args.training, train_dataset=train, optimizers=(optimizer, scheduler))

    worker = small_worker(tmp_path, build_trainer=build)
    with pytest.raises(ConfigError, match=r"build_trainer: .*received one with optimizers=\(...\)"):
        worker.trainer("client-0")


def frozen_worker(directory: Path, seed: int) -> Worker:
    """FFA-LoRA: A is random, frozen and no part of the updates; `seed` decides what this process
    happened to draw."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def build(args: Any) -> tuple[nn.Module, None]:
        model = get_peft_model(tiny_llama(1), config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad = False
                parameter.data.normal_(generator=generator)
        return model, None

    worker = small_worker(directory, clients=2)
    worker.build_model = build
    return worker


def test_frozen_tensors_are_the_servers(tmp_path: Path) -> None:
    """Two processes built different frozen A; a run from the first one's state is the same in
    both, also when the second process built its Trainers before it heard of the server.
    """
    states = []
    first = frozen_worker(tmp_path / "first", seed=1)

    def again(state: ServerState) -> ServerState:
        return state.as_built(state.manifest)

    begun = run_small(first, num_rounds=1, steps=1, on_round=lambda s, r: states.append(again(s)))
    start = states[0]
    assert start.static
    expected = run_small(frozen_worker(tmp_path / "a", seed=1), start=again(start))
    other = frozen_worker(tmp_path / "b", seed=2)
    for name in other.names:
        other.trainer(name)
    assert not same_tensors(collect_static(other.model), start.static)
    state = run_small(other, start=again(start))
    assert same_tensors(collect_static(other.model), start.static)
    assert same_tensors(state.params, expected.params)
    assert eval_losses(state) == eval_losses(expected)
    assert begun.round == 1


def test_the_model_is_built_once(tmp_path: Path) -> None:
    """Clients, controls and evaluation share one model; its parameters stay the same objects."""
    built: list[nn.Module] = []

    def build(args: Any) -> tuple[nn.Module, None]:
        model, tokenizer = build_model(args)
        built.append(model)
        return model, tokenizer

    worker = small_worker(tmp_path, clients=3)
    worker.build_model = build
    before = [id(parameter) for parameter in worker.model.parameters()]
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in worker.model.named_parameters()
        if not parameter.requires_grad
    }
    run_small(worker)
    run_small(worker.fork(work_dir=tmp_path / "fork"))
    assert len(built) == 1
    assert [id(parameter) for parameter in worker.model.parameters()] == before
    now = dict(worker.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
