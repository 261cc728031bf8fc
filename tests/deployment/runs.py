"""Runs of two sites that are long enough to find a process in the middle of a round and kill it."""

from __future__ import annotations

import json
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedtune.adapters import load_exported
from fedtune.assets import MODEL_DIR
from fedtune.server.checkpoint import load_latest
from tests.deployment.parts import Deployment, Program, Step, kill

ROUNDS, STEPS = 4, 4
PLAN = ["--num_rounds", ROUNDS, "--steps_per_round", STEPS, "--min_clients", 2]
KEEPS = ["--save_steps", STEPS]  # a checkpoint of each round's end
STEP_S = 0.5  # a round is long enough to find a process in it and kill it
FLOWER_S = 60  # Flower takes two missed signs of life, 30 s apart, for an end
BUSY_S = 30  # what a machine with too much to do may add


class Run:
    """A run over the sites of a deployment, and what they trained in it."""

    def __init__(self, deployment: Deployment, output: str, *flags: Any) -> None:
        self.deployment, self.output, self.flags = deployment, output, flags
        self.directory = deployment.directory / output
        self._before = {site: len(deployment.steps(site)) for site in "ab"}
        self.submit = deployment.submit(output, *PLAN, *flags)

    def resume(self) -> None:
        self.submit = self.deployment.submit(self.output, *PLAN, *self.flags, "--resume")

    def steps(self, site: str) -> list[Step]:
        return self.deployment.steps(site)[self._before[site] :]

    def reaches_round(self, number: int, site: str) -> None:
        """Wait until the site is past the first step of a round."""
        step = (number - 1) * STEPS + 1
        self.deployment.until(lambda: any(row.step >= step for row in self.steps(site)))

    def is_in_round(self, number: int) -> bool:
        return len(self.rounds) == number - 1

    def await_round(self, number: int) -> None:
        """Wait until the round is over."""
        self.deployment.until(lambda: len(self.rounds) >= number)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        file = self.directory / "rounds.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def finish(self) -> dict[str, Tensor]:
        """Wait for the end; returns the last adapter."""
        assert self.submit.wait() == 0, self.submit.printed
        assert [record["round"] for record in self.rounds] == list(range(1, ROUNDS + 1))
        return self.adapter()

    def adapter(self) -> dict[str, Tensor]:
        """What anyone would load from disk, which is that of the last round."""
        params, _, _ = load_exported(self.directory / "adapter")
        state = load_latest(self.directory / "checkpoints")
        assert state is not None
        assert state.round == self.rounds[-1]["round"]
        same(params, state.params)
        base = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
        PeftModel.from_pretrained(base, str(self.directory / "adapter"))
        return params


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def times(steps: list[Step]) -> list[int]:
    """How often each step of the run was trained."""
    return [sum(row.step == number for row in steps) for number in range(ROUNDS * STEPS)]


def note(what: str, seconds: float) -> None:
    """For whoever wants to know (pytest -rP)."""
    print(f"{what}: {seconds:.1f} s")


def killed_by_test(process: psutil.Process, run: Run, number: int) -> float:
    """SIGKILL it in the middle of a round; returns when."""
    when = kill(process)
    assert run.is_in_round(number), "the machine is too busy: the round was over before"
    return when


class Sites:
    """Two sites, whose scripts may change between tests."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._flags: list[list[Any]] = []
        self._joined: dict[str, Program] = {}

    def running(self, *flags: list[Any]) -> dict[str, Program]:
        """Sites a and b, whose scripts have these flags."""
        if self._flags != [*flags]:
            self.end()
            self._flags = [*flags]
            for name, words in zip("ab", flags, strict=True):
                self._joined[name] = self._deployment.join(name, "--step_s", STEP_S, *words)
        return self._joined

    def end(self) -> None:
        """As by SIGTERM of an operator."""
        assert [site.end() for site in self._joined.values()] == [143] * len(self._joined)
        self._joined = {}
