"""A run that stops and goes on is the whole run, whatever its method keeps, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.server.checkpoint import ServerState, load_latest
from fedtune.server.store import RunStore
from fedtune.strategies import METHODS
from fedtune.strategies.lora import LORA_RULES
from tests.federation.small import run_small, same_tensors, small_worker


@pytest.mark.parametrize("name", ["scaffold", "flora", "fedex_lora", "fedsa_lora", "rolora"])
def test_a_resumed_run_is_the_whole_run(name: str, tmp_path: Path) -> None:
    """Stopped in round 3, before it counted: clients roll back to what round 2 left behind."""
    method = {**METHODS, **LORA_RULES}[name]()
    given = {"method": method, "num_rounds": 4, "steps": 2, "fraction_train": 0.7}

    class KilledError(Exception):
        pass

    def run(part: str, stop: int = 99, **more: Any) -> ServerState:
        worker = small_worker(tmp_path / part / "clients", clients=3)
        store = RunStore(tmp_path / part / "run", num_rounds=4, save_every_rounds=2)

        def on_round(state: ServerState, record: dict[str, Any]) -> None:
            if state.round == stop:
                raise KilledError
            store.on_round(state, record)

        start = load_latest(tmp_path / part / "run" / "checkpoints")
        return run_small(worker, on_round=on_round, start=start, **given)

    whole = run("whole")
    with pytest.raises(KilledError):
        run("killed", stop=3)
    resumed = run("killed")
    assert same_tensors(resumed.params, whole.params)
    assert bool(whole.base.terms) == (name in ("flora", "fedex_lora"))
    assert same_tensors(resumed.base.tensors(), whole.base.tensors())
    assert resumed.base.error == whole.base.error
    assert resumed.method_state.keys() == whole.method_state.keys()
    for key, kept in whole.method_state.items():
        assert same_tensors(resumed.method_state[key], kept)
    assert [timeless(record) for record in resumed.history] == [
        timeless(record) for record in whole.history
    ]
    for client, number in whole.client_rounds.items():
        left, right = (
            tmp_path / part / "clients" / client / "memory" / f"round-{number:05d}.safetensors"
            for part in ("killed", "whole")
        )
        assert left.exists() == right.exists() == (name in ("scaffold", "fedsa_lora"))
        if left.exists():
            assert left.read_bytes() == right.read_bytes()


def timeless(value: Any) -> Any:
    """The value without what a clock says."""
    if isinstance(value, dict):
        clocks = {"wall_s", "time", "train_s"}
        return {key: timeless(item) for key, item in value.items() if key not in clocks}
    return [timeless(item) for item in value] if isinstance(value, list) else value
