"""`--engine flower --client_ranks`: each site builds its own rank and trains as in inline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.adapters import load_exported
from fedtune.strategies.lora.names import lora_modules
from tests.deployment.test_flower_engine import FLAGS, ROUNDS, SCRIPT, STEPS, steps_of
from tests.recipes.runs import run_here


def products(output: Path) -> dict[str, Tensor]:
    params, _, manifest = load_exported(output / "adapter")
    return {
        name: manifest.scaling[name] * params[module.b].double() @ params[module.a].double()
        for name, module in lora_modules(params).items()
    }


def losses(output: Path) -> list[float]:
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    found: list[float] = summary["arms"]["federated"]["eval_loss"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["flexlora", "flora"])
def test_two_ranks_are_the_same_in_both_engines(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding: inline pads the lower rank, whose matrix products are then larger."""
    for engine in ("flower", "inline"):
        monkeypatch.setenv("FEDTUNE_TEST_STEPS", str(tmp_path / f"{engine}.jsonl"))
        mixed = ("--num_clients", "2", "--client_ranks", "2,4", "--strategy", strategy)
        done = run_here(
            SCRIPT, *FLAGS, *mixed, "--engine", engine, "--output_dir", tmp_path / engine
        )
        assert done.status == 0, done.out + done.err
    flower, inline = (steps_of(tmp_path / f"{engine}.jsonl") for engine in ("flower", "inline"))
    assert len(flower) == len(inline) == 2 * ROUNDS * STEPS
    for left, right in zip(flower, inline, strict=True):
        assert left["step"] == right["step"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)  # fp32
    assert losses(tmp_path / "flower") == pytest.approx(losses(tmp_path / "inline"), rel=1e-4)
    one, other = products(tmp_path / "flower"), products(tmp_path / "inline")
    for name, value in other.items():
        # Adam divides by the size of a gradient: of the smallest, the rounding shows.
        assert float((one[name] - value).norm()) <= 1e-3 * float(value.norm())
        assert torch.isfinite(value).all()
