"""The arms are those of the script alone, whatever the method has frozen or added to the base."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.adapters import load_exported
from fedtune.adapters.base_terms import base_terms
from fedtune.compare.arms import ArmInput, run_arm
from fedtune.run.federate import federate_control
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import FedAvg, Method
from fedtune.strategies.lora import LORA_RULES
from tests.federation.small import arguments, run_small, same_tensors, small_worker

ARMS = ["centralized", "local", "fixed_global", "parity"]
RULES = ["ffa_lora", "flora", "rolora", "fedsa_lora"]


def federated(directory: Path, method: Method) -> ArmInput:
    worker = small_worker(directory / "clients", clients=2)
    worker.args = arguments(worker.args.training, num_rounds=2, steps_per_round=2)
    first: list[ServerState] = []

    def keep(state: ServerState, record: dict[str, Any]) -> None:
        if not state.round:
            first.append(copy.deepcopy(state))

    state = run_small(worker, method=method, on_round=keep, num_rounds=2, steps=2)
    federate = partial(federate_control, worker.args)
    return ArmInput(worker.args, worker, first[0], state.history, directory / "arms", federate)


def what_it_computes(arm: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arm.items() if key in KEYS}


KEYS = {"eval_loss", "train_loss", "samples", "tokens", "identical", "first_diff_step"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Any]]:
    """Every arm of a FedAvg run."""
    given = federated(tmp_path_factory.mktemp("fedavg"), FedAvg())
    return {
        name: (run_arm(name, given), load_exported(given.directory / name / "adapter"))
        for name in ARMS
    }


@pytest.mark.parametrize("rule", RULES)
def test_arms_do_not_depend_on_the_rule(
    rule: str, tmp_path: Path, plain: dict[str, tuple[dict[str, Any], Any]]
) -> None:
    """To the last bit those of FedAvg, which start from the plain base and train A and B."""
    given = federated(tmp_path, LORA_RULES[rule]())
    start = given.built
    assert bool(given.start.static) == (rule == "ffa_lora")
    assert bool(base_terms(given.worker.model)) == (rule == "flora")
    for name in ARMS:
        arm = run_arm(name, given)
        assert not base_terms(given.worker.model)
        assert all(p.requires_grad for n, p in given.worker.model.named_parameters() if "lora" in n)
        wanted, (params, static, manifest) = plain[name]
        assert what_it_computes(arm) == what_it_computes(wanted), name
        found = load_exported(given.directory / name / "adapter")
        assert same_tensors(found[0], params)
        assert found[1] == static == {}
        assert found[2].hash == manifest.hash
        if name in ("centralized", "local", "parity"):
            moved = [n for n, value in params.items() if not torch.equal(value, start.params[n])]
            assert moved == sorted(params)
        if name == "parity":
            assert arm["identical"]
