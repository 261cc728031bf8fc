"""What a run leaves beside a full model's weights."""

from __future__ import annotations

import json
from pathlib import Path

from fedtune.adapters import collect, describe
from fedtune.adapters.beside import Beside
from fedtune.server.checkpoint import ServerState
from fedtune.server.store import RunStore
from tests.tiny import tiny_llama

BESIDE = Beside({"tokenizer.json": b"{}"}, {"use_cache": True})


def store(directory: Path, beside: Beside) -> RunStore:
    return RunStore(directory, num_rounds=1, save_every_rounds=1, beside=beside)


def first_state() -> ServerState:
    model = tiny_llama()
    model.config.use_cache = False  # as a Trainer leaves it
    return ServerState(0, collect(model), {}, describe(model), history=[{"round": 0}])


def test_it_is_there_after_every_round(tmp_path: Path) -> None:
    store(tmp_path, BESIDE).on_round(first_state(), {"round": 0})
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == b"{}"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_cache"] is True


def test_a_server_in_another_process_is_completed(tmp_path: Path) -> None:
    store(tmp_path, Beside()).on_round(first_state(), {"round": 0})
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    store(tmp_path, BESIDE).complete()
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_cache"] is True
