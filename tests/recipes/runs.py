"""Recipes, found by glob, and the ways to run them: as a user does, and quickly in this process."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "recipes").rglob("*.py"))
RECIPES = [path for path in SCRIPTS if "fedtune.launch(" in path.read_text()]

# A run of seconds: the embedded corpus's first rows (all labels occur), two clients, two rounds.
TINY = [
    *("--max_rows", "60", "--partition", "iid", "--num_clients", "2", "--num_rounds", "2"),
    *("--steps_per_round", "2", "--per_device_train_batch_size", "4"),
]


def demo_of(script: Path) -> Path:
    """The YAML with what suits the model in the package; a script of a test has lora_sft's."""
    if script not in RECIPES:
        return recipe("lora_sft").with_name("demo.yaml")
    return script.with_name(
        "demo.yaml" if script.stem == "lora_sft" else f"demo_{script.stem}.yaml"
    )


def tiny(script: Path) -> list[str]:
    """`TINY` for this recipe, with the tiny model's settings; ranks are named client by client."""
    flags = ["--config", str(demo_of(script)), "--compare", "none", "--eval_fraction", "0.1", *TINY]
    return [*flags, "--client_ranks", "2,4"] if script.stem == "mixed_ranks" else flags


class Done(NamedTuple):
    """How a run ended and what it wrote to the terminal."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that are the error; bitsandbytes warns of a missing package on import."""
        return [line for line in self.err.splitlines() if not line.startswith("Failed to load CPU")]


def recipe(name: str) -> Path:
    return REPOSITORY / "recipes" / f"{name}.py"


def run_cli(script: Path, *flags: str | Path, cwd: Path, timeout_s: float = 240) -> Done:
    """`python recipes/NAME.py flags` in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, *map(str, flags)],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "WANDB_MODE"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_here(script: Path, *flags: str | Path) -> Done:
    """The same in this process: imports are paid once."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    argv = [str(script), *map(str, flags)]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
        warnings.catch_warnings(),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            status = 0 if end.code is None else int(end.code)
        finally:
            logging.captureWarnings(False)
    return Done(status, out.getvalue(), err.getvalue())


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below `directory` with its bytes, None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }
