"""A run that a learning rate of 1 ruins, told as that."""

import json

import torch

from fedtune.adapters import load_exported
from tests.recipes.runs import TINY, recipe, run_here


def test_a_run_that_collapsed(tmp_path):
    out = tmp_path / "run"
    flags = ("--learning_rate", "1", "--compare", "centralized", "--output_dir", out)
    done = run_here(recipe("lora_sft"), *TINY, *flags)
    assert done.status == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    parts = summary["data"]["held_out"], summary["data"]["train"]
    assert [part["rows"] for part in parts] == [6, 54]
    hashes = [*(part["sha256"] for part in parts), *summary["model"].values()]
    assert len({digest for digest in hashes if len(digest) == 64}) == 4
    losses = summary["arms"]["federated"]["eval_loss"]
    assert losses[0] < min(losses[1:]), "the learning rate ruins every round"
    assert "training made it worse: " in done.out
    assert "best round: 0 (initial adapter)" in done.out
    assert "raining made it worse" in (out / "report.html").read_text()
    start, ruined = (load_exported(out / name)[0] for name in ("best", "adapter"))
    assert all(not start[name].any() for name in start if "lora_B" in name)
    assert not all(torch.equal(start[name], ruined[name]) for name in start)
