"""Models of other kinds in rounds: trained in full, in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import fedtune
from fedtune.relay.folder import RunFolder
from tests.client.driver import Server, trained
from tests.client.trainers import small_trainer, train
from tests.federation.small import same_tensors, small_rows
from tests.tiny import tiny_llama


def test_a_model_trained_in_full(run: RunFolder, tmp_path: Path) -> None:
    plain = train(small_trainer(tmp_path / "plain", model=tiny_llama(1)))
    trainer = fedtune.patch(small_trainer(tmp_path / "federated", model=tiny_llama(1)))
    with Server(run):
        federated = train(trainer)
    fedtune.unpatch(trainer)
    assert federated.losses == plain.losses
    assert same_tensors(federated.params, plain.params)


@pytest.mark.parametrize("given", [{"bf16": True}, {"torch_dtype": torch.bfloat16}])
def test_half_precision(run: RunFolder, tmp_path: Path, given: dict[str, Any]) -> None:
    """Under autocast, and with parameters that are bf16 themselves."""

    def build(name: str) -> Trainer:
        own = dict(given)
        model = tiny_llama(1).to(own.pop("torch_dtype", torch.float32))
        return small_trainer(tmp_path / name, model=model, **own)

    plain = train(build("plain"))
    trainer = fedtune.patch(build("federated"))
    with Server(run):
        federated = train(trainer)
    fedtune.unpatch(trainer)
    assert federated.losses == plain.losses
    assert same_tensors(federated.params, plain.params)


def test_a_classifiers_labels_are_its_rows(run: RunFolder, tmp_path: Path) -> None:
    rows = small_rows(9)
    labelled = rows.remove_columns("labels").add_column("labels", [i % 2 for i in range(9)])
    trainer = small_trainer(tmp_path, model=tiny_llama(1, num_labels=2), train=labelled)
    trainer.eval_dataset = labelled
    fedtune.patch(trainer)
    with Server(run) as server:
        trainer.train()
    fedtune.unpatch(trainer)
    assert trained(server.updates[0])["num-tokens"] == 8
    assert server.scores[0]["num-tokens"] == server.scores[0]["num-examples"] == 9
