"""Recipes with a codec: what it costs in bytes and in loss, on each engine, killed on the way."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.recipes.runs import RECIPES, TINY, recipe, run_here, tiny, tree

LORA = recipe("lora_sft")
WEIGHTS = "adapter_model.safetensors"
LONGER = ("--num_rounds", "3", "--steps_per_round", "20")  # long enough to be killed in a round
ROUND_MB = re.compile(r"about ([0-9.]+) MB in both directions")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(name, *flags)` in `tmp_path/name`; returns the series of the federated arm."""
    monkeypatch.chdir(tmp_path)

    def run(name, *more, script=LORA, flags=None):
        done = run_here(script, *(flags or tiny(script)), "--output_dir", name, *more)
        assert done.status == 0, done.err
        return series(tmp_path / name)

    return run


@pytest.fixture
def half(tmp_path):
    """A recipe of somebody's own that trains the tiny model in bf16, which load_base would not."""
    script = tmp_path / "half.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(LORA.parent)!r})\n"
        "import fedtune, lora_sft\n"
        "def build_model(args):\n"
        "    model, tokenizer = lora_sft.build_model(args)\n"
        "    return model.bfloat16(), tokenizer\n"
        "fedtune.launch(build_model, lora_sft.build_trainer)\n"
    )
    return script


def series(directory):
    return json.loads((directory / "summary.json").read_text())["arms"]["federated"]


def rounds(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("codec", ["int8", "nf4"])
@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_each_recipe(codec, script, run):
    """As many bytes as --dry_run says, and about the loss of a run without."""
    flags = (*tiny(script), "--codec", codec)
    said = float(ROUND_MB.search(run_here(script, *flags, "--dry_run").out)[1])
    coded, plain = run("coded", "--codec", codec, script=script), run("plain", script=script)
    sent = (coded["bytes_up"][-1] + coded["bytes_down"][-1]) / 1e6
    # Beside the values: names, and for int8 blocks of 256 values that small tensors do not fill.
    assert said <= sent <= 1.2 * said + 0.004
    raw = ("bytes_up_raw", "bytes_down_raw")
    assert [coded[name] for name in raw] == [plain[name] for name in raw]
    first, *_, last = coded["eval_loss"]
    assert first == plain["eval_loss"][0]
    # Of what training gains in these few steps a codec takes little.
    gain = first - plain["eval_loss"][-1]
    assert last < plain["eval_loss"][-1] + 0.1 * gain


def test_a_model_in_bf16_travels_without_loss(half, run, tmp_path):
    """And in fewer bytes than its own, 2 a value."""
    script = {"script": half, "flags": ["--peft_method", "none", *TINY]}
    plain, coded = run("plain", **script), run("coded", "--codec", "bf16", **script)
    assert coded["eval_loss"] == plain["eval_loss"]
    assert tree(tmp_path / "coded" / "model") == tree(tmp_path / "plain" / "model")
    assert coded["bytes_up"][-1] < coded["bytes_up_raw"][-1] == plain["bytes_up"][-1]


@pytest.mark.slow
def test_ray_is_inline(run, tmp_path):
    """What a client has is on disk, whichever process it is in."""
    pytest.importorskip("ray")
    flags = ("--codec", "nf4", "--num_rounds", "3", "--num_clients", "3", "--fraction_train", "0.7")
    inline, ray = run("inline", *flags), run("ray", *flags, "--engine", "ray")
    for name in ("eval_loss", "train_loss", "bytes_up", "bytes_down"):
        assert inline[name][1:] == ray[name][1:]
    weights = [tmp_path / name / "adapter" / WEIGHTS for name in ("inline", "ray")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def killed_in_round_2(directory, *more, script=LORA, flags=None):
    """SIGKILL to a run of its own, once the first round is durable."""
    words = [sys.executable, script, *(flags or tiny(script)), *LONGER]
    process = subprocess.Popen(
        [*words, "--output_dir", directory, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (directory / "checkpoints" / "round-00001").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(rounds(directory)) == 1, "the machine is too busy: the second round was over before"


@pytest.mark.slow
def test_a_killed_run_goes_on_without_loss(half, run, tmp_path):
    """Where the codec loses nothing, whole messages do not either."""
    script = {"script": half, "flags": ["--peft_method", "none", *TINY]}
    codec = ("--codec", "bf16")
    whole = run("whole", *LONGER, *codec, **script)
    killed_in_round_2(tmp_path / "killed", *codec, **script)
    killed = run("killed", *LONGER, *codec, "--resume", **script)
    assert killed["eval_loss"] == whole["eval_loss"]
    assert tree(tmp_path / "killed" / "model") == tree(tmp_path / "whole" / "model")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_one_whole_message_to_each(run, tmp_path):
    whole = run("whole", *LONGER, "--codec", "nf4")
    killed_in_round_2(tmp_path / "killed", "--codec", "nf4")
    killed = run("killed", *LONGER, "--codec", "nf4", "--resume")
    assert killed["eval_loss"][:2] == whole["eval_loss"][:2]
    gain = whole["eval_loss"][0] - whole["eval_loss"][-1]
    assert abs(killed["eval_loss"][-1] - whole["eval_loss"][-1]) < 0.05 * gain
    adapter = load_file(tmp_path / "whole" / "adapter" / WEIGHTS)
    values = sum(tensor.numel() for tensor in adapter.values())
    for before, after in zip(rounds(tmp_path / "whole"), rounds(tmp_path / "killed"), strict=True):
        for client in ("client-0", "client-1"):
            more = after["clients"][client]["bytes_down"] - before["clients"][client]["bytes_down"]
            expected = (2 - 0.516) * values if after["round"] == 2 else 0
            assert math.isclose(more, expected, abs_tol=0.03 * values)
