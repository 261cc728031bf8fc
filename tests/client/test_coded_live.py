"""Patched Trainers under a codec: the clients of a simulation, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Trainer

from fedtune.client.app import client_app
from fedtune.client.codec_link import CodecLink
from fedtune.engines.inline import run_inline
from fedtune.server.app import ServerRun, server_app
from fedtune.server.checkpoint import ServerState
from fedtune.transport.settings import CodecSettings
from tests.client.federations import Site, federate_sites
from tests.client.test_methods_live import KilledOnce, assert_same, run_of, site_trainer
from tests.federation.small import PLAN, ROUNDS, STEPS, result_of, small_worker


def coded(method: str, codec: str, **settings: Any) -> ServerRun:
    run: ServerRun = run_of(method)
    run.codec = CodecSettings(codec, **{"min_size": 1, **settings})
    return run


def inline(directory: Path, run: ServerRun) -> ServerState:
    worker = small_worker(directory, clients=2, dropout=0.0)
    run_inline(server_app(run), client_app(lambda: worker), 2)
    return result_of(run)


SETTINGS = {
    "int8": ("fedavg", "int8", {}),
    "nf4, fed back": ("fedavg", "nf4", {"feedback": True}),
    "up": ("fedavg", "nf4", {"direction": "up", "feedback": True}),
    "control": ("scaffold", "nf4", {"feedback": True}),
    "personal": ("fedsa_lora", "nf4", {"feedback": True}),
    "base": ("flora", "int8", {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sites_train_as_the_clients_of_a_simulation(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what each of them has lost and keeps for the next round."""
    monkeypatch.setattr(CodecLink, "forget", lambda link: None)
    method, codec, given = SETTINGS[name]
    expected = inline(tmp_path / "inline", coded(method, codec, **given))
    run = coded(method, codec, **given)
    state, sites = federate_sites(run, tmp_path / "sites", site_trainer)
    assert_same(state, expected)
    for left, right in zip(state.history[1:], expected.history[1:], strict=True):
        for kind in ("bytes_up", "bytes_down", "bytes_up_raw", "bytes_down_raw"):
            assert left[kind] == right[kind]
        assert left["attempt"] == 1
    for site in sites:
        kept = site.output / f"_fedtune_transport-{PLAN.run}-{site.name}" / "residual"
        assert kept.exists() == bool(given.get("feedback"))
        if kept.exists():
            theirs = tmp_path / "inline" / site.name / "transport" / "residual"
            file = f"round-{ROUNDS:05d}.safetensors"
            left, right = load_file(kept / file), load_file(theirs / file)
            assert left.keys() == right.keys()
            assert all(left[key].equal(right[key]) for key in left)


def test_nothing_is_left_of_a_run_that_is_done(tmp_path: Path) -> None:
    _, sites = federate_sites(coded("fedavg", "nf4", feedback=True), tmp_path, site_trainer)
    for site in sites:
        assert site.output.is_dir()
        assert not list(site.output.glob("_fedtune_transport*"))


class Script:
    """A site whose second script goes on where the first was killed, in round 2.

    Attributes:
        trained: every step, as (site, step).
    """

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.trained: list[tuple[str, int]] = []

    def __call__(self, name: str, directory: Path) -> Trainer:
        given = {"save_strategy": "steps", "save_steps": STEPS}
        trainer = site_trainer(name, directory, callbacks=[KilledOnce(self.killed, name)], **given)
        step = trainer.training_step

        def training_step(*args: Any, **more: Any) -> Any:
            self.trained.append((name, trainer.state.global_step))
            return step(*args, **more)

        vars(trainer)["training_step"] = training_step
        return trainer

    def assert_nothing_twice(self, sites: list[Site], state: ServerState) -> None:
        """The other site answers the second attempt with what it has."""
        assert [site.starts for site in sites] == [1, 2]
        assert state.history[2]["attempt"] == 2
        steps = [step for name, step in self.trained if name == "client-0"]
        assert steps == list(range(ROUNDS * STEPS))


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_a_script_that_is_started_again_goes_on(tmp_path: Path, method: str) -> None:
    """With what its update before had lost."""
    given = {"direction": "up", "feedback": True}
    script = Script()
    state, sites = federate_sites(coded(method, "nf4", **given), tmp_path / "sites", script)
    script.assert_nothing_twice(sites, state)
    assert_same(state, inline(tmp_path / "inline", coded(method, "nf4", **given)))


def test_a_script_that_is_started_again_gets_a_whole_message(tmp_path: Path) -> None:
    """At 16 bits, instead of a difference at 8; the other site's next one is a difference."""
    script = Script()
    state, sites = federate_sites(coded("fedavg", "int8"), tmp_path / "sites", script)
    script.assert_nothing_twice(sites, state)
    clients = state.history[2]["clients"]
    assert clients["client-1"]["bytes_down"] > 1.5 * clients["client-0"]["bytes_down"]
    expected = inline(tmp_path / "inline", coded("fedavg", "int8"))
    for name, tensor in expected.params.items():
        # Half a unit of bf16, of values below 1; what Adam makes of it is of the same size.
        assert float((state.params[name] - tensor).abs().max()) < 4 * 2**-9
