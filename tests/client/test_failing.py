"""What a server hears of a script that fails: the type, and an id that leads to the site's log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import fedtune
from fedtune.client import failing
from fedtune.errors import DataError, private
from fedtune.relay.folder import RunFolder
from tests.client.driver import Server
from tests.client.trainers import small_trainer
from tests.conftest import REPOSITORY

ROW = "{'patient': 'Jane Roe'}"
LOOP = """
import torch, fedtune
fedtune.init({"w": torch.zeros(2)})
update = fedtune.receive()
raise ValueError("cannot tokenize {'patient': 'Jane Roe'}")
"""


class Fails(TrainerCallback):
    """Raises where it is told to."""

    def __init__(self, where: str, error: BaseException) -> None:
        setattr(self, where, self._fail)
        self._error = error

    def _fail(self, *_: Any, **__: Any) -> None:
        raise self._error


def ask_for(kind: str, errors: list[str]) -> Any:
    def script(server: Server) -> None:
        params = server.begin()
        if kind == "evaluate":
            hash_ = server.manifest.hash if server.manifest else ""
            frame = server.ask("evaluate", params, round=0, manifest=hash_)
        else:
            frame = server.send(server.folder, server.train_frame(1, params))
        errors.append(str(frame.error))

    return script


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("train", "on_substep_end"),
        ("train", "on_step_end"),
        ("evaluate", "on_prediction_step"),
    ],
)
def test_an_exception_in_the_run(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, where: str
) -> None:
    errors: list[str] = []
    trainer = small_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.add_callback(Fails(where, ValueError(f"cannot tokenize\n{ROW}")))
    fedtune.patch(trainer)
    with Server(run, ask_for(kind, errors)), pytest.raises(ValueError, match="Jane Roe"):
        trainer.train()
    fedtune.unpatch(trainer)
    failure = run.failure
    assert failure is not None
    assert errors == [f"training failed: ValueError (id {failure.id})"]
    assert (
        f"fedtune: [id {failure.id}] ValueError: cannot tokenize {ROW}\n" in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("label: received x in row 3."), "training failed: label: received x in row 3."),
        (SystemExit(4), "the script ends with status 4"),
        (SystemExit("Jane Roe"), "the script ends with status 1"),
        (SystemExit(), "the script ends with status 0"),
        (KeyboardInterrupt(), "the script is being ended"),
    ],
    ids=repr,
)
def test_what_else_may_end_a_run(
    run: RunFolder, tmp_path: Path, error: BaseException, reason: str
) -> None:
    errors: list[str] = []
    trainer = small_trainer(tmp_path)
    trainer.add_callback(Fails("on_step_end", error))
    fedtune.patch(trainer)
    with Server(run, ask_for("train", errors)), pytest.raises(type(error)):
        trainer.train()
    fedtune.unpatch(trainer)
    assert errors == [reason]


def test_an_error_with_a_row_is_told_without_it(capfd: pytest.CaptureFixture[str]) -> None:
    error = DataError(f"label: received {private(ROW)} in row 3.")
    told = failing.told(error)
    assert told == failing.told(error)
    found = re.fullmatch(r"label: received … in row 3\. \(id (\w{8})\)", told)
    assert found is not None
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"fedtune: [id {found[1]}] label: received {ROW} in row 3."]


def test_an_exception_in_a_loop_of_ones_own(run: RunFolder, tmp_path: Path) -> None:
    """It leaves the interpreter; what it was is known when that ends."""
    errors: list[str] = []

    def script(server: Server) -> None:
        errors.append(str(server.send(run, server.train_frame(1, server.begin())).error))

    with Server(run, script):
        done = subprocess.run(
            [sys.executable, "-c", LOOP],
            cwd=REPOSITORY,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    failure = run.failure
    assert failure is not None
    assert errors == [f"the script failed: ValueError (id {failure.id})"]
    assert f"fedtune: [id {failure.id}] ValueError: cannot tokenize {ROW}" in done.stderr


def test_the_first_failure_of_a_script_is_why(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes, the others fail because the first one has."""
    failing.note_failure(ValueError("why"))
    failing.note_failure(RuntimeError("connection closed by peer"))
    assert run.failure is not None
    assert run.failure.text == "ValueError: why"
    run.forget_failure()
    assert run.failure is None
