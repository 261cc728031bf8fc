"""One setting of the table, run as a user runs it, and all that was recorded and written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fedtune
from tests.conftest import REPOSITORY
from tests.recount.recorder import FOLDER, Recording, load_children, recorded
from tests.recount.rows import Corpus, write_corpus

ALL = "centralized,centralized_large_batch,local,fixed_global,parity"
HERE = Path(__file__).parent
CONFIG = """
num_clients: 2
num_rounds: 2
per_device_train_batch_size: 4
per_device_eval_batch_size: 3
lr_scheduler_type: linear
lora_r: 4
lora_alpha: 8
lora_target_modules: all-linear
partition: column
partition_column: silo
logging_steps: 3
max_grad_norm: 1.0
"""


@dataclass(frozen=True)
class Setting:
    """A line of the table; what the checks must know stands beside the flags that ask for it."""

    name: str
    kind: str = "pairs"
    flags: str = ""
    arms: str = ""
    recipe: str = "lora_sft"
    train: int = 24
    evaluation: int = 7
    sizes: tuple[int, ...] = (1, 1)
    rounds: int = 2
    steps: int = 2  # 0: by epochs
    epochs: float = 0.0
    batch: int = 4
    accumulation: int = 1
    drop_last: bool = False
    fraction: float = 1.0
    max_length: int | None = None
    weight_by: str = "tokens"
    mean: bool = True  # the clients' mean is the next global: no server optimizer, no codec
    exact: bool = True  # the loss trained on is that of a forward pass of ours: no dropout
    smoothing: float = 0.0
    codec: bool = False
    full: bool = False
    seeds: tuple[int, ...] = (42,)
    packed: bool = False
    engine: str = "inline"
    stop_in: int = 0  # interrupted in this call of train(), and resumed
    carry: bool = True  # rows come again only when all have been seen
    extras: int = 0  # control variates and the like: as many values again, up and down
    only_last: bool = False  # what is scored is more than what a client trains in a round
    wide: bool = False  # a client may have lower ranks than the live adapter

    @property
    def classes(self) -> tuple[str, ...]:
        return ("negative", "neutral", "positive") if self.kind == "labels" else ()

    def argv(self, corpus: Corpus, out: Path, config: Path) -> list[str]:
        budget = ["--steps_per_round", self.steps] if self.steps else []
        budget += ["--epochs_per_round", self.epochs] if self.epochs else []
        given: dict[str, Any] = {
            "--num_clients": len(self.sizes),
            "--num_rounds": self.rounds,
            "--per_device_train_batch_size": self.batch,
            "--gradient_accumulation_steps": self.accumulation,
            "--fraction_train": self.fraction,
            "--weight_by": self.weight_by,
            "--engine": self.engine,
            "--learning_rate": 1e-2,  # a flag: an adapter of another kind has a rate of its own
            "--seeds": ",".join(map(str, self.seeds)),
        }
        words = [word for pair in given.items() for word in pair] + budget
        words += ["--config", config, "--train_file", corpus.train_file]
        words += ["--eval_file", corpus.eval_file, "--output_dir", out]
        words += ["--max_length", self.max_length] if self.max_length else []
        words += ["--label_smoothing_factor", self.smoothing] if self.smoothing else []
        words += ["--dataloader_drop_last", "true"] if self.drop_last else []
        words += ["--compare", self.arms] if self.arms else []
        return [*map(str, words), *shlex.split(self.flags)]


@dataclass(frozen=True, eq=False)
class Run:
    """What a setting's run did and what it says."""

    setting: Setting
    corpus: Corpus
    out: Path
    recording: Recording
    text: str
    summary: dict[str, Any] = field(repr=False)

    def root(self, seed: int) -> Path:
        return self.out if len(self.setting.seeds) == 1 else self.out / "seeds" / str(seed)

    def rounds(self, seed: int) -> dict[int, dict[str, Any]]:
        """Lines of `rounds.jsonl` by their round."""
        lines = (self.root(seed) / "rounds.jsonl").read_text().splitlines()
        return {line["round"]: line for line in map(json.loads, lines)}


def run(setting: Setting, directory: Path) -> Run:
    """Raises AssertionError when it does not end well."""
    directory.mkdir(parents=True)
    corpus = write_corpus(
        directory,
        setting.kind,
        train=setting.train,
        evaluation=setting.evaluation,
        sizes=setting.sizes,
    )
    config, out = directory / "config.yaml", directory / "out"
    config.write_text(CONFIG)
    argv = setting.argv(corpus, out, config)
    if setting.engine == "flower":
        recording, text = _in_processes(setting, argv, directory)
    else:
        recording, text = _here(setting, argv)
    summary = json.loads((out / "summary.json").read_text())
    return Run(setting, corpus, out, recording, text, summary)


def _here(setting: Setting, argv: list[str]) -> tuple[Recording, str]:
    recipe = runpy.run_path(str(_recipe(setting)), run_name="recipe")
    said = io.StringIO()

    def launch(*more: str) -> int:
        try:
            with contextlib.redirect_stdout(said):
                _launch(recipe, [*argv, *more])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    with recorded(stop_in=setting.stop_in) as recording:
        if setting.stop_in:
            assert launch() == 130
            # The round that was interrupted is done again.
            del recording.trains[-1 - (setting.stop_in - 1) % len(setting.sizes) :]
            assert launch("--resume") == 0
        else:
            assert launch() == 0
    return recording, said.getvalue()


def _launch(recipe: dict[str, Any], argv: list[str]) -> None:
    more = {"training_class": recipe["TrainingArguments"]} if "scores" in recipe else {}
    fedtune.launch(recipe["build_model"], recipe["build_trainer"], argv=argv, **more)


def _in_processes(setting: Setting, argv: list[str], directory: Path) -> tuple[Recording, str]:
    records = directory / "records"
    records.mkdir()
    done = subprocess.run(
        [sys.executable, HERE / "recorded_recipe.py", *argv],
        env={
            **os.environ,
            FOLDER: str(records),
            "FEDTUNE_TEST_RECIPE": str(_recipe(setting)),
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Recording(load_children(records)), done.stdout


def _recipe(setting: Setting) -> Path:
    own = HERE / f"{setting.recipe}.py"
    return own if own.is_file() else REPOSITORY / "recipes" / f"{setting.recipe}.py"
