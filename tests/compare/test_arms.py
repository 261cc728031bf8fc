"""The arms on a tiny run: equal data and samples, and controls that notice what is off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from fedtune.adapters import collect, load_exported
from fedtune.client.replies import Sent
from fedtune.client.worker import Worker
from fedtune.compare.arms import ArmInput, run_arm
from fedtune.run.federate import federate_control
from fedtune.server.checkpoint import ServerState
from fedtune.transport.messages import EvaluateTask
from tests.federation.small import (
    ROUNDS,
    STEPS,
    build_trainer,
    run_small,
    same_tensors,
    small_rows,
    small_worker,
)
from tests.tiny import tiny_llama

CLIENTS = 3
BATCH = 2


def federated(directory: Path, build: Any = build_trainer, **given: Any) -> ArmInput:
    """A federated run of 3 clients with 13, 9 and 17 rows, as the arms receive it."""
    worker = small_worker(directory / "clients", clients=CLIENTS, build_trainer=build, **given)
    worker.train |= {"client-1": small_rows(9, seed=1), "client-2": small_rows(17, seed=2)}
    first: list[ServerState] = []

    def keep(state: ServerState, record: dict[str, Any]) -> None:
        if not state.round:
            first.append(copy.deepcopy(state))

    state = run_small(worker, on_round=keep)
    return ArmInput(
        args=worker.args,
        worker=worker,
        start=first[0],
        history=state.history,
        directory=directory / "arms",
        federate=partial(federate_control, worker.args),
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> ArmInput:
    return federated(tmp_path_factory.mktemp("federated"))


def samples(given: ArmInput) -> list[int]:
    return [record["samples"] for record in given.history]


@pytest.mark.parametrize(("name", "factor"), [("centralized", 1), ("centralized_large_batch", 3)])
def test_pooled_arms_are_read_at_equal_samples(given: ArmInput, name: str, factor: int) -> None:
    """At the first step that reaches: never fewer samples, and less than one batch more."""
    arm = run_arm(name, given)
    assert len(arm["eval_loss"]) == ROUNDS + 1
    assert arm["samples"][0] == 0
    for ours, theirs in zip(arm["samples"][1:], samples(given)[1:], strict=True):
        assert theirs <= ours < theirs + BATCH * factor
    assert arm["eval_loss"][0] == given.history[0]["eval_loss"]
    assert arm["eval_loss"][-1] < arm["eval_loss"][0]
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in arm["train_loss"][1:])
    assert arm["train_loss"][0] is None
    assert arm["bytes_up"] == [0] * (ROUNDS + 1)
    # every row of 12 tokens has 11 that the loss sees
    assert arm["tokens"] == [11 * count for count in arm["samples"]]


def test_the_exported_adapter_is_the_one_that_was_scored(given: ArmInput) -> None:
    arm = run_arm("centralized", given)
    path = given.directory / "centralized" / "adapter"
    model = PeftModel.from_pretrained(tiny_llama(1), path).eval()
    ids = torch.tensor(given.worker.evaluation["input_ids"])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    # one batch of 6 rows, as the Trainer evaluates; 1e-6: fp32 sums in another order
    assert loss == pytest.approx(arm["eval_loss"][-1], rel=1e-6)
    assert not (given.directory / "centralized" / "work").exists()


def test_large_batch_takes_a_third_of_the_steps(given: ArmInput) -> None:
    steps: dict[str, int] = {}

    def counting(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Trainer:
        trainer = build_trainer(args, model, tokenizer, train, evaluation)
        trainer.add_callback(_Count(steps, Path(args.training.output_dir).name))
        return trainer

    counted = copy.copy(given.worker)
    counted.build_trainer = counting
    other = ArmInput(**{**vars(given), "worker": counted})
    for name in ("centralized", "centralized_large_batch"):
        run_arm(name, other)
    # 24 samples a round and 39 rows: 20 batches an epoch of the pooled rows, or 7 of three times
    # the size; epoch ends cut batches short, so a third up to one step per epoch
    assert steps["centralized"] // 3 <= steps["centralized_large_batch"]
    assert steps["centralized_large_batch"] <= steps["centralized"] // 3 + 2
    assert ROUNDS * STEPS <= steps["centralized_large_batch"] <= ROUNDS * STEPS + 1


class _Count(TrainerCallback):
    def __init__(self, steps: dict[str, int], name: str) -> None:
        self.steps, self.name = steps, name

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[self.name] = state.global_step


def test_local_is_each_client_alone(given: ArmInput) -> None:
    arm = run_arm("local", given)
    assert [client["client"] for client in arm["clients"]] == given.worker.names
    per_round = [
        {reply["client"]: reply["examples"] for reply in record["replies"]}
        for record in given.history[1:]
    ]
    for client in arm["clients"]:
        own = [counts[client["client"]] for counts in per_round]
        assert client["samples"] == [0, *(sum(own[: k + 1]) for k in range(ROUNDS))]
        assert client["eval_loss"][0] == given.history[0]["eval_loss"]
    for k in range(ROUNDS + 1):
        losses = [client["eval_loss"][k] for client in arm["clients"]]
        assert arm["eval_loss"][k] == pytest.approx(sum(losses) / CLIENTS, rel=1e-15)
    # the adapter that is kept is the best client's
    params, _, _ = load_exported(given.directory / "local" / "adapter")
    task = EvaluateTask(run="", round=ROUNDS, manifest="")
    metrics = given.worker.evaluate("client-0", task, Sent(params)).metrics
    assert metrics["eval_loss"] == min(client["eval_loss"][-1] for client in arm["clients"])


def test_one_client_alone_is_a_federation_of_one(tmp_path: Path) -> None:
    """With a single client the local, the centralized and the federated curve coincide."""
    worker = small_worker(tmp_path / "clients")
    first: list[ServerState] = []
    state = run_small(worker, on_round=lambda state, record: first.append(copy.deepcopy(state)))
    given = ArmInput(
        args=worker.args,
        worker=worker,
        start=first[0],
        history=state.history,
        directory=tmp_path / "arms",
        federate=partial(federate_control, worker.args),
    )
    federated = [record["eval_loss"] for record in state.history]
    for name in ("local", "centralized", "centralized_large_batch"):
        arm = run_arm(name, given)
        assert arm["eval_loss"] == federated, name
        assert arm["samples"] == [record["samples"] for record in state.history]
        params, _, _ = load_exported(given.directory / name / "adapter")
        assert same_tensors(params, state.params)


def test_fixed_global_is_flat(given: ArmInput) -> None:
    arm = run_arm("fixed_global", given)
    assert arm["eval_loss"] == [given.history[0]["eval_loss"]] * (ROUNDS + 1)
    assert arm["samples"] == samples(given)
    params, _, _ = load_exported(given.directory / "fixed_global" / "adapter")
    assert same_tensors(params, given.start.params)


def test_fixed_global_notices_a_client_that_scores_its_own_model(tmp_path: Path) -> None:
    """Break it: evaluation without loading the global parameters first."""
    given = federated(tmp_path)
    assert len(set(run_arm("fixed_global", given)["eval_loss"])) == 1
    broken = copy.copy(given.worker)

    def fork(**settings: Any) -> Worker:
        forked = given.worker.fork(**settings)
        forked.evaluate = lambda client, task, sent: Worker.evaluate(  # type: ignore[method-assign]
            forked, client, task, Sent(collect(forked.model))
        )
        return forked

    broken.fork = fork  # type: ignore[method-assign]
    arm = run_arm("fixed_global", ArmInput(**{**vars(given), "worker": broken}))
    assert len(set(arm["eval_loss"])) > 1


def test_parity_is_identical(given: ArmInput) -> None:
    arm = run_arm("parity", given)
    assert (arm["identical"], arm["first_diff_step"]) == (True, None)


def test_parity_with_label_smoothing(tmp_path: Path) -> None:
    """The smoother takes the labels out of the batch; tokens are counted all the same."""
    given = federated(tmp_path, label_smoothing_factor=0.1)
    arm = run_arm("parity", given)
    assert (arm["identical"], arm["first_diff_step"]) == (True, None)
    assert arm["tokens"] == [11 * count for count in arm["samples"]]
    assert arm["tokens"][-1] > 0


class Perturb(TrainerCallback):
    """Changes one number of the model after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            with torch.no_grad():
                parameter.view(-1)[0] += 1.0


def perturbed(step: int, who: Callable[[str], bool]) -> Any:
    def build(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Trainer:
        trainer = build_trainer(args, model, tokenizer, train, evaluation)
        if who(Path(args.training.output_dir).name):
            trainer.add_callback(Perturb(step))
        return trainer

    return build


@pytest.mark.parametrize("side", ["plain", "client-0"])
@pytest.mark.parametrize(("step", "seen"), [(1, 2), (6, 7), (12, 12)])
def test_parity_names_the_first_step_that_differs(
    tmp_path: Path, side: str, step: int, seen: int
) -> None:
    """A change after step 6 shows in the loss of step 7; after the last step in the parameters."""
    given = federated(tmp_path)
    broken = copy.copy(given.worker)
    broken.build_trainer = perturbed(step, lambda name: name == side)
    arm = run_arm("parity", ArmInput(**{**vars(given), "worker": broken}))
    assert (arm["identical"], arm["first_diff_step"]) == (False, seen)


def test_arms_leave_the_run_as_it_was(given: ArmInput) -> None:
    """Arguments, clients' state and the start state are the federated run's own."""
    training = given.worker.args.training
    before = training.to_dict(), copy.deepcopy(given.start.params)
    state_files = sorted(given.worker.work_dir.rglob("*"))
    for name in ("centralized_large_batch", "local", "fixed_global", "parity"):
        run_arm(name, given)
    assert training.to_dict() == before[0]
    assert same_tensors(given.start.params, before[1])
    assert sorted(given.worker.work_dir.rglob("*")) == state_files
    assert given.start.round == 0
    assert len(given.start.history) == 1
