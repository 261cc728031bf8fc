"""Every figure of every arm is a loss per token, whatever the eval batch size."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import nn
from transformers import Trainer

from fedtune.adapters import load, load_exported
from fedtune.client.worker import Worker
from fedtune.compare.arms import ArmInput, run_arm
from fedtune.compare.compose import build_summary
from fedtune.compare.facts import Facts
from fedtune.compare.own_rows_scorer import OwnRows
from fedtune.config import ARMS
from fedtune.results.series import Series
from fedtune.run.federate import federate_control, own_scores
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import build_method
from tests.client.test_per_token import CLOSE, by_hand, padded, ragged, sharp
from tests.federation.small import (
    arguments,
    build_model,
    run_small,
    small_worker,
    training_arguments,
)
from tests.tiny import tiny_llama

ROWS = ragged()
OWN = {"client-0": [0, 3, 4], "client-1": [1, 2, 5, 6, 9], "client-2": []}


def built(args: Any) -> tuple[nn.Module, None]:
    model, tokenizer = build_model(args)
    return sharp(model), tokenizer


def build_trainer(
    args: Any, model: nn.Module, tokenizer: Any, train: Dataset, evaluation: Dataset | None
) -> Trainer:
    collate: Any = padded
    return Trainer(
        model=model,
        args=args.training,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=evaluation,
    )


def run(directory: Path, batch: int, strategy: str = "fedavg") -> tuple[Worker, dict[str, Any]]:
    """Three clients, two rounds, all arms; the results as a run has them."""
    training = training_arguments(directory, per_device_eval_batch_size=batch)
    args = arguments(training, num_rounds=2, steps_per_round=2, strategy=strategy)
    rows = {f"client-{k}": Dataset.from_list(ragged()[k::3] * 2) for k in range(3)}
    held_out = Dataset.from_list(ROWS)
    worker = Worker(built, build_trainer, args, rows, held_out, directory / "clients")
    base_loss = worker.base_loss()
    first: list[ServerState] = []
    method = build_method(strategy, weight_by="tokens")
    state = run_small(
        worker,
        method=method,
        on_round=lambda state, record: first.append(copy.deepcopy(state)),
        num_rounds=2,
        steps=2,
    )
    own_rows = {client: held_out.select(part) for client, part in OWN.items()}
    own = OwnRows(worker, own_rows, directory / "own")
    given = ArmInput(
        args, worker, first[0], state.history, directory / "arms", partial(federate_control, args)
    )
    given = replace(given, own=own)
    federated = {
        **Series.of_history(state.history).to_json(),
        "time": [row["time"] for row in state.history],
    }
    results: dict[str, Any] = {"federated": federated}
    results |= {name: run_arm(name, given) for name in ARMS}
    results["federated"]["own"] = own_scores(args, worker, state, own)
    facts = Facts(
        config={"federation": asdict(args.federation), "transport": asdict(args.transport)},
        seeds=[42],
        clients=[{"client": client} for client in rows],
        base_loss=base_loss,
        own_rows={client: len(part) for client, part in OWN.items()},
    )
    summary = build_summary(facts, [results]).to_json()
    return worker, {"summary": summary, "state": state, "directory": directory / "arms"}


def loss_of(worker: Worker, params: Any, rows: list[Any] = ROWS) -> float:
    load(worker.model, params, worker.manifest)
    return by_hand(worker.model, rows)[0]


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_all_arms(tmp_path: Path, batch: int) -> None:
    worker, found = run(tmp_path, batch)
    summary, state = found["summary"], found["state"]
    arms = summary["arms"]
    assert summary["base_loss"] == pytest.approx(by_hand(sharp(tiny_llama(1)), ROWS)[0], rel=CLOSE)
    for name in ("federated", "centralized", "centralized_large_batch", "fixed_global"):
        params = state.params
        if name != "federated":
            params = load_exported(found["directory"] / name / "adapter")[0]
        expected = loss_of(worker, params)
        assert arms[name]["eval_loss"][-1] == pytest.approx(expected, rel=CLOSE), name
        # LoRA starts at the base
        assert arms[name]["eval_loss"][0] == pytest.approx(summary["base_loss"], rel=CLOSE)
    best = loss_of(worker, load_exported(found["directory"] / "local" / "adapter")[0])
    finals = [client["eval_loss"][-1] for client in arms["local"]["clients"]]
    assert min(finals) == pytest.approx(best, rel=CLOSE)

    own = summary["verdict"]["gain_over_local_own_pct"]
    rows = {entry["client"]: entry for entry in own["clients"]}
    assert [rows[client]["rows"] for client in OWN] == [3, 5, 0]
    assert set(rows["client-2"].values()) == {"client-2", 0, None}
    central = load_exported(found["directory"] / "centralized" / "adapter")[0]
    for client in ("client-0", "client-1"):
        mine = [ROWS[i] for i in OWN[client]]
        entry = rows[client]
        assert entry["federated"] == pytest.approx(loss_of(worker, state.params, mine), rel=CLOSE)
        assert entry["centralized"] == pytest.approx(loss_of(worker, central, mine), rel=CLOSE)
        gain = 100 * (1 - entry["federated"] / entry["local"])
        assert entry["gain_pct"] == pytest.approx(gain, rel=1e-12)
    best_client = f"client-{finals.index(min(finals))}"
    if rows[best_client]["rows"]:
        mine = [ROWS[i] for i in OWN[best_client]]
        local = load_exported(found["directory"] / "local" / "adapter")[0]
        assert rows[best_client]["local"] == pytest.approx(loss_of(worker, local, mine), rel=CLOSE)
    gains = [rows[client]["gain_pct"] for client in ("client-0", "client-1")]
    assert own["mean"] == pytest.approx(sum(gains) / 2, rel=1e-12)
    assert own["std"] is None


def test_a_client_is_scored_with_what_stays_with_it(tmp_path: Path) -> None:
    """FedSA-LoRA: B is each client's own, so the same rows have another loss at each."""
    worker, found = run(tmp_path, 3, "fedsa_lora")
    state: ServerState = found["state"]
    entries = found["summary"]["verdict"]["gain_over_local_own_pct"]["clients"]
    for entry in entries[:2]:
        client = entry["client"]
        personal = worker.personal(client, 2)
        assert personal
        mine = [ROWS[i] for i in OWN[client]]
        expected = loss_of(worker, {**state.params, **personal}, mine)
        assert entry["federated"] == pytest.approx(expected, rel=CLOSE)
        assert loss_of(worker, state.params, mine) != pytest.approx(expected, rel=1e-4)


def test_the_base_models_loss_leaves_no_trace(tmp_path: Path) -> None:
    """The federation that follows, dropout and all, is the one without it."""
    losses = []
    for asked in (False, True):
        worker = small_worker(tmp_path / str(asked))
        if asked:
            trainer = worker.trainer(worker.evaluator)
            assert worker.base_loss() is not None
            assert trainer.state.log_history == []
        state = run_small(worker)
        losses.append([(row["eval_loss"], row["train_loss"]) for row in state.history])
    assert losses[0] == losses[1]
