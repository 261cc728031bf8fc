"""Rounds for code that is no Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fedtune
from fedtune.client import api
from fedtune.errors import ConfigError, ManifestError, RoundError
from fedtune.relay.folder import RunFolder
from fedtune.relay.frames import encode
from fedtune.transport.coded_records import VERSION, facts_of, wrap
from fedtune.transport.messages import SETUP, pack
from fedtune.transport.versions import fingerprint
from tests.client.driver import Params, Server, send, trained

FIRST = {"w": torch.zeros(2, 3), "b": torch.ones(3)}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    if api._client is not None:
        api._client.session.close()
        api._client = None


def _ended() -> bool:
    """Whether the run's result comes next, once."""
    final = fedtune.receive()
    return final is not None and final.is_final and fedtune.receive() is None


def test_a_loop_of_ones_own(run: RunFolder) -> None:
    with Server(run, lambda server: server.whole_run(evaluate=False)) as server:
        fedtune.init(FIRST)
        seen = []
        while (update := fedtune.receive()) is not None:
            seen.append((update.round, update.num_rounds, update.config["steps"], update.is_final))
            if update.is_final:
                result = update
                continue
            keys = update.config.keys()
            params = {name: value + 1 for name, value in update.params.items()}
            fedtune.send(params, num_examples=5, metrics={"num_tokens": 50, "train_loss": 0.5})
    assert seen == [*((number, 3, 4, False) for number in (1, 2, 3)), (3, 3, 4, True)]
    assert result.config.keys() == keys
    assert all(torch.equal(result.params[name], value + 3) for name, value in FIRST.items())
    assert not fedtune.is_running()
    assert fedtune.receive() is None
    metrics = trained(server.updates[-1])
    assert [metrics[key] for key in ("num-examples", "num-tokens", "num-steps", "train-loss")] == [
        5, 50, 4, 0.5,
    ]  # fmt: skip


def test_a_loop_that_asks_whether_it_goes_on(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    assert fedtune.is_running()
    rounds = 0
    with Server(run, lambda server: server.whole_run(evaluate=False)):
        fedtune.init(FIRST)
        while fedtune.is_running():
            update = fedtune.receive()
            assert update is not None
            assert fedtune.is_running() != update.is_final
            fedtune.send(update.params, num_examples=1)  # dropped at the end, and said
            rounds += 1
    assert rounds == 4
    assert "the run is over (done), so nothing is sent" in caplog.text


def test_first_parameters_may_share_memory(run: RunFolder) -> None:
    """They are kept for the first difference, where the run has a codec."""
    both = torch.ones(3, 4)
    first = {"a": both, "b": both, "c": torch.nn.Parameter(torch.zeros(2))}
    name = fingerprint({f"arrays/{key}": tensor for key, tensor in first.items()})
    said: list[object] = []

    def script(server: Server) -> None:
        params = server.begin()
        assert server.manifest is not None
        plain = pack(arrays={}, config={"run": "run", "manifest": server.manifest.to_json()})
        frame = send(run, encode(SETUP, wrap(plain, None, {VERSION: name})))
        said.append(facts_of(server.good(frame))[VERSION])
        server.finish(params, 0, "stopped")

    with Server(run, script):
        fedtune.init(first)
        assert _ended()
    assert said == [name]
    assert (run.path / "transport" / f"version-{name}.safetensors").is_file()


def test_without_first_parameters_others_give_them(run: RunFolder) -> None:
    errors: list[str] = []

    def script(server: Server) -> None:
        errors.append(str(server.ask("query.initial", round=0).error))
        manifest = api._manifest_of(FIRST)
        server.manifest = manifest
        server.good(server.ask("query.setup", {}, manifest=manifest.to_json()))
        errors.append(str(server.ask("evaluate", FIRST, round=0).error))
        server.finish(server.train(1, FIRST), 1)

    with Server(run, script):
        fedtune.init()
        update = fedtune.receive()
        assert update is not None
        fedtune.send(update.params, num_examples=1)
        assert _ended()
    assert "--init_adapter" in errors[0]
    assert "expected a round" in errors[1]


def test_outside_a_federation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="fedtune join"):
        fedtune.init()
    assert not fedtune.is_running()
    assert "no run to take part in" in caplog.text
    with pytest.raises(ConfigError, match=r"fedtune\.init\(\) before"):
        fedtune.receive()
    with pytest.raises(ConfigError, match=r"fedtune\.init\(\) before"):
        fedtune.send(FIRST, num_examples=1)


def test_mistakes_are_named(run: RunFolder) -> None:
    with Server(run, lambda server: server.whole_run(evaluate=False)):
        fedtune.init(FIRST)
        with pytest.raises(RoundError, match="Call receive first"):
            fedtune.send(FIRST, num_examples=1)
        update = fedtune.receive()
        assert update is not None
        with pytest.raises(RoundError, match=r"fedtune\.send for the round"):
            fedtune.receive()
        bad: list[Params] = [{}, {**FIRST, "b": FIRST["b"] / 0}, {**FIRST, "b": torch.ones(4)}]
        for params in bad:
            with pytest.raises(ManifestError):
                fedtune.send(params, num_examples=1)
        fedtune.send(FIRST, num_examples=1)
        while (update := fedtune.receive()) is not None:
            fedtune.send(update.params, num_examples=1)


@pytest.mark.parametrize(
    "given",
    [
        {"frozen": ["w"]},
        {"personal": ["w"]},
        {"correction": "scaffold"},
        {"correction": "fedprox", "correction_settings": '{"mu": 0.1}'},
        {"adds_to_base": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_methods_that_need_a_trainer_are_refused(run: RunFolder, given: dict[str, Any]) -> None:
    """In the first round, in one line; the site goes on to wait."""
    errors: list[str] = []

    def script(server: Server) -> None:
        params = server.begin()
        errors.append(str(server.send(run, server.train_frame(1, params, **given)).error))
        server.finish(server.train(1, params), 1)

    with Server(run, script):
        fedtune.init(FIRST)
        update = fedtune.receive()
        assert update is not None
        fedtune.send(update.params, num_examples=1)
        assert _ended()
    assert errors[0].startswith("receive: expected a method that needs nothing but parameters")
    assert "Use fedtune.patch" in errors[0]
    assert "\n" not in errors[0]


def test_a_failed_run_raises(run: RunFolder) -> None:
    def script(server: Server) -> None:
        server.finish(server.begin(), 0, "failed: nobody came")

    with Server(run, script):
        fedtune.init(FIRST)
        with pytest.raises(RoundError, match="nobody came"):
            fedtune.receive()
