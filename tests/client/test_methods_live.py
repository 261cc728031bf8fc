"""Every method that wants something of its clients, with patched Trainers and the real server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from fedtune.adapters import collect
from fedtune.client.memory import ClientMemory
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import build_method
from tests.client.federations import Killed, Site, federate_sites
from tests.client.trainers import small_trainer
from tests.federation.small import (
    PLAN,
    ROUNDS,
    run_small,
    same_tensors,
    server_run,
    small_rows,
    small_worker,
)
from tests.tiny import tiny_llama, tokens

METHODS = [
    "scaffold",
    "fedprox",
    "ffa_lora",
    "rolora",
    "fedsa_lora",
    "flora",
    "fedex_lora",
    "scaffold+rolora",
    "fedprox+fedsa_lora",
    "fedprox+ffa_lora+fedadam",
]


def site_trainer(name: str, directory: Path, **given: Any) -> Trainer:
    """The script of a site: the rows of the same client of a simulation."""
    rows = small_rows(13, seed=int(name.rpartition("-")[2]))
    return small_trainer(directory, dropout=0.0, train=rows, **given)


def run_of(method: str, clients: int = 2) -> Any:
    return server_run(clients, method=build_method(method, weight_by="tokens"))


def inline(method: str, directory: Path) -> tuple[ServerState, Any]:
    worker = small_worker(directory, clients=2, dropout=0.0)
    return run_small(worker, method=build_method(method, weight_by="tokens")), worker


def assert_same(left: ServerState, right: ServerState) -> None:
    assert same_tensors(left.params, right.params)
    assert same_tensors(left.static, right.static)
    assert same_tensors(left.base.tensors(), right.base.tensors())
    assert left.method_state.keys() == right.method_state.keys()
    for name, kept in left.method_state.items():
        assert same_tensors(kept, right.method_state[name])
    for old, new in zip(left.history, right.history, strict=True):
        assert old["eval_loss"] == new["eval_loss"]
        assert old["train_loss"] == pytest.approx(new["train_loss"], abs=1e-6)  # fp32 sums


def personal(site: Site, number: int = ROUNDS) -> dict[str, Any]:
    memory = ClientMemory(site.output / f"fedtune_memory-{PLAN.run}-{site.name}")
    return dict(memory.read(number).personal)


@pytest.mark.parametrize("method", METHODS)
def test_sites_train_as_the_clients_of_a_simulation(tmp_path: Path, method: str) -> None:
    """Bit for bit, with what each client keeps, and what the last model of a site is."""
    expected, worker = inline(method, tmp_path / "inline")
    state, sites = federate_sites(run_of(method), tmp_path / "sites", site_trainer)
    assert_same(state, expected)
    for site in sites:
        own = worker.personal(site.name, ROUNDS) if "fedsa" in method else {}
        if own:
            assert same_tensors(personal(site), own)
        assert site.trainer is not None
        assert site.trainer.model is not None
        final = {**expected.static, **expected.params, **own}
        assert same_tensors(collect(site.trainer.model), dict(sorted(final.items())))


class KilledOnce(TrainerCallback):
    """Ends the first script as its second round begins."""

    def __init__(self, killed: list[str], name: str) -> None:
        self._killed, self._name = killed, name

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4 and self._name == "client-1" and not self._killed:
            self._killed.append(self._name)
            raise Killed


@pytest.mark.parametrize("method", ["scaffold", "fedsa_lora", "flora"])
def test_a_script_that_is_started_again_goes_on(tmp_path: Path, method: str) -> None:
    """With its control and its personal factors, and its optimizer from its own checkpoint."""
    killed: list[str] = []

    def script(name: str, directory: Path) -> Trainer:
        given = {"save_strategy": "steps", "save_steps": 4}
        return site_trainer(name, directory, callbacks=[KilledOnce(killed, name)], **given)

    expected, _ = inline(method, tmp_path / "inline")
    state, sites = federate_sites(run_of(method), tmp_path / "sites", script)
    assert [site.starts for site in sites] == [1, 2]
    assert state.history[2]["attempt"] == 2
    assert_same(state, expected)


def test_a_refused_last_round_leaves_the_personal_factors_that_counted(tmp_path: Path) -> None:
    """Site 1 trains NaN in the last round, and is not asked to score; it ends as after round 2."""

    class LastNaN(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 10:
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("nan"))
            return loss

    def script(name: str, directory: Path) -> Trainer:
        trainer = site_trainer(name, directory, cls=LastNaN if name == "client-1" else Trainer)
        if name == "client-1":
            trainer.eval_dataset = None
        return trainer

    run = run_of("fedsa_lora")
    run.min_replies = "1"
    state, sites = federate_sites(run, tmp_path, script)
    assert state.client_rounds == {"client-0": 3, "client-1": 2}
    assert sites[1].trainer is not None
    assert sites[1].trainer.model is not None
    final = collect(sites[1].trainer.model)
    own = personal(sites[1], 2)
    assert own
    assert same_tensors({name: final[name] for name in own}, own)


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_the_whole_adapter_is_left_where_peft_can_load_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """1e-5: fp32 sums of about 32 terms in another order, on logits near 1."""
    with caplog.at_level(logging.WARNING):
        _, sites = federate_sites(run_of(method), tmp_path, site_trainer)
    for site in sites:
        whole = site.output / "fedtune_adapter"
        (warning,) = [r.message for r in caplog.records if str(whole) in r.message]
        assert "save_model leaves out" in warning
        assert site.trainer is not None
        live = site.trainer.model
        assert live is not None
        live.eval()
        loaded = PeftModel.from_pretrained(tiny_llama(1), str(whole)).eval()
        with torch.no_grad():
            expected = live(input_ids=tokens()).logits
            torch.testing.assert_close(
                loaded(input_ids=tokens()).logits, expected, rtol=0, atol=1e-5
            )
            site.trainer.save_model(str(site.output / "saved"))
            saved = PeftModel.from_pretrained(tiny_llama(1), str(site.output / "saved")).eval()
            without = saved(input_ids=tokens()).logits
        assert (without - expected).abs().max() > 1e-3  # what the warning is for


def test_nothing_is_written_where_the_adapter_is_all(tmp_path: Path) -> None:
    _, sites = federate_sites(run_of("ffa_lora"), tmp_path, site_trainer)
    assert not any((site.output / "fedtune_adapter").exists() for site in sites)
