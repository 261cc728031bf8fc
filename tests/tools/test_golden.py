"""The record of short runs: it notices what changes, and nothing that depends on the clock."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import REPOSITORY
from tools.golden import compare, digest_of, losses_in, result_of

RECORD = {
    "processor": ["x86_64", "AVX2"],
    "runs": {"a": {"tensors": "1", "losses": {}}, "b": {"left out": "two runs of it differ"}},
}


def save(directory: Path, **tensors: torch.Tensor) -> Path:
    (directory / "adapter").mkdir(parents=True)
    save_file(tensors, directory / "adapter" / "adapter_model.safetensors")
    return directory


def test_the_digest_is_of_names_and_bits(tmp_path: Path) -> None:
    one = digest_of(save(tmp_path / "1", w=torch.zeros(2)))
    assert one == digest_of(save(tmp_path / "2", w=torch.zeros(2)))
    others = [{"w": torch.tensor([0.0, -0.0])}, {"v": torch.zeros(2)}, {"w": torch.zeros(2, 1)}]
    found = [digest_of(save(tmp_path / f"o{k}", **other)) for k, other in enumerate(others)]
    assert one not in found
    assert len(set(found)) == 3


def test_losses_are_all_that_is_read() -> None:
    arm = {"eval_loss": [1.0], "wall_s": [3.0], "runs": [{"train_loss": [None, 2.0], "wall_s": 1}]}
    again = {
        "eval_loss": [1.0],
        "wall_s": [9.0],
        "runs": [{"train_loss": [None, 2.0], "wall_s": 2}],
    }
    assert losses_in({"federated": arm}) == losses_in({"federated": again})
    assert losses_in(arm) != losses_in({**arm, "eval_loss": [1.5]})
    assert losses_in(arm) != losses_in({**arm, "runs": [{"train_loss": [None, 2.5]}]})


def test_records_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(RECORD, copy.deepcopy(RECORD)) == 0
    assert capsys.readouterr().out.split() == ["a", "equal", "b", "left", "out"]
    changed = copy.deepcopy(RECORD)
    changed["runs"]["a"]["tensors"] = "2"
    assert compare(RECORD, changed) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    failed = {**RECORD, "runs": {"a": {"failed": ["error"]}}}
    assert compare(failed, failed) == 1
    assert compare(RECORD, {**RECORD, "processor": ["x86_64", "AVX512"]}) == 1
    assert "not comparable" in capsys.readouterr().out
    assert compare(RECORD, {**RECORD, "runs": {}}) == 1


@pytest.mark.slow
def test_a_run_repeats_itself() -> None:
    words = (
        "recipes/lora_sft.py --config recipes/demo.yaml --num_rounds 1 --steps_per_round 1 "
        "--compare none --strategy scaffold"
    )
    first = result_of(REPOSITORY, words)
    assert first == result_of(REPOSITORY, words)
    assert len(first["tensors"]) == 64
    assert result_of(REPOSITORY, f"{words} --no_such_flag")["failed"]
