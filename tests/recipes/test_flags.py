"""Flags on a recipe, each in a run of seconds in this process."""

from __future__ import annotations

import hashlib
import json
import math

import pytest

from fedtune.compare import arms
from fedtune.errors import RoundError
from fedtune.server.store import RunStore
from tests.recipes.runs import RECIPES, demo_of, recipe, run_here, tiny, tree

LORA, MIXED = recipe("lora_sft"), recipe("mixed_ranks")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(*flags)` in `tmp_path`, with --output_dir out; it must succeed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, script=LORA, refused=False):
        done = run_here(script, *tiny(script), "--output_dir", "out", *flags)
        assert done.status == (2 if refused else 0), done.err
        return done

    return run


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


def eval_loss(directory):
    return summary(directory)["arms"]["federated"]["eval_loss"]


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_dry_run_writes_nothing(script, run, tmp_path):
    out = run("--dry_run", script=script).out
    assert tree(tmp_path) == {}
    assert "client-1    27" in out
    assert "held out   6 rows" in out
    assert "2 of 2 clients, 2 steps each" in out
    assert "2 rounds, 1 seed(s), 8 steps" in out
    assert " MB in both directions" in out
    assert "memory     base model" in out


def test_dry_run_with_a_codec(run):
    """42 matrices of rank 8. A 4-bit value is 0.516 bytes of 4."""
    plain = run("--dry_run").out
    mb = float(plain.split(" MB in both directions")[0].split()[-1])
    out = run("--dry_run", "--codec", "nf4").out
    assert "codec      nf4 on delta, up and down, 42 of 42 tensors; error feedback on" in out
    assert f"about {mb * 0.516 / 4:.3f} MB in both directions (13 % of raw)" in out
    assert f"about {2 * mb * 0.516 / 4:.2f} MB a seed" in out
    out = run("--dry_run", "--codec", "fp16", "--codec_args", "include=*lora_A*").out
    assert "fp16 on delta, up and down, 21 of 42 tensors; error feedback off" in out
    out = run("--dry_run", "--codec", "int8", "--codec_direction", "up").out
    assert f"about {mb / 2 * (1 + 1.016 / 4):.3f} MB in both directions (63 % of raw)" in out


def test_a_codec_that_codes_nothing_is_refused_before_anything_is_written(run, tmp_path):
    err = run("--codec", "nf4", "--codec_args", "include=*nothing*", refused=True).err
    assert "--codec nf4: expected a trained tensor that is coded, received 42 that are not" in err
    assert tree(tmp_path) == {}


def test_dry_run_tells_what_a_method_sends_and_a_server_keeps(run):
    """Control variates, both ways; two versions of an adapter, of each client that differs."""
    plain = run("--dry_run").out
    mb = float(plain.split(" MB in both directions")[0].split()[-1])
    assert "what clients have" not in plain
    out = run("--dry_run", "--strategy", "scaffold").out
    assert "as much again for control variates" in out
    assert f"{2 * mb:.3f} MB in both directions" in out
    out = run("--dry_run", "--strategy", "scaffold", "--codec", "int8").out
    assert f"and what clients have {2 * 2 * mb / 4:.2f} MB; activations" in out
    out = run("--dry_run", "--codec", "int8").out
    assert f"and what clients have {2 * mb / 4:.2f} MB; activations" in out
    half = ("--fraction_train", "0.5")
    out = run("--dry_run", "--codec", "int8", *half).out
    assert f"and what clients have {4 * mb / 4:.2f} MB; activations" in out
    assert "at least " in run("--dry_run", "--strategy", "flora").out


def test_a_second_run(run, tmp_path):
    """Refused; then resumed, which has nothing left to do; then replaced."""
    run()
    first = tree(tmp_path / "out")
    assert "holds an earlier run" in run(refused=True).err
    assert tree(tmp_path / "out") == first
    loss = eval_loss(tmp_path / "out")
    run("--resume")
    assert eval_loss(tmp_path / "out") == loss
    assert (tmp_path / "out" / "rounds.jsonl").read_bytes() == first["rounds.jsonl"]
    again = tree(tmp_path / "out" / "adapter")
    assert again == {name[8:]: data for name, data in first.items() if name[:8] == "adapter/"}
    run("--overwrite", "--learning_rate", "1e-4")
    assert eval_loss(tmp_path / "out")[0] == loss[0]
    assert eval_loss(tmp_path / "out")[1:] != loss[1:]


def test_an_interrupted_run_is_resumed(run, tmp_path, monkeypatch):
    """Bit for bit the run that was never interrupted."""
    run("--output_dir", "whole")
    on_round = RunStore.on_round

    def interrupt(store, state, record):
        on_round(store, state, record)
        if record["round"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "on_round", interrupt)
        done = run_here(LORA, *tiny(LORA), "--output_dir", "out")
    assert done.status == 130
    assert "--resume" in done.err
    ended = summary(tmp_path / "out")
    assert (ended["status"], ended["where"]) == ("interrupted", "in round 2 of 2")
    run("--resume")
    assert summary(tmp_path / "out")["status"] == "completed"
    assert eval_loss(tmp_path / "out") == eval_loss(tmp_path / "whole")
    assert tree(tmp_path / "out" / "adapter") == tree(tmp_path / "whole" / "adapter")


def test_seeds(run, tmp_path):
    run("--seeds", "1,2", "--compare", "local")
    top = summary(tmp_path / "out")
    seeds = [tmp_path / "out" / "seeds" / name for name in ("1", "2")]
    for directory in seeds:
        names = {path.name for path in directory.iterdir()}
        assert {"summary.json", "rounds.jsonl", "adapter", "best", "arms", "loss.png"} <= names
        assert "report.html" in names
    one, two = (eval_loss(directory) for directory in seeds)
    assert one != two
    mean = [(a + b) / 2 for a, b in zip(one, two, strict=True)]
    assert top["arms"]["federated"]["eval_loss"] == pytest.approx(mean, rel=1e-12)
    assert [series["eval_loss"] for series in top["arms"]["federated"]["runs"]] == [one, two]
    assert top["seeds"] == [1, 2]
    assert math.isfinite(top["verdict"]["gain_over_local_pct"]["std"])
    assert tree(tmp_path / "out" / "adapter") == tree(seeds[0] / "adapter")
    run("--seed", "1", "--output_dir", "alone")
    assert eval_loss(tmp_path / "alone") == one


def test_a_seed_and_an_arm_that_fail_leave_the_others(run, tmp_path, monkeypatch):
    """Seed 2 fails in round 1, an arm of seed 3: means are over the one that is whole."""
    on_round, local = RunStore.on_round, arms._ARMS["local"]

    def fail(store, state, record):
        on_round(store, state, record)
        if store._directory.name == "2":
            raise RoundError("round 1 failed 3 times: 0 of 2 needed updates (client-1: too late)")

    def fail_in_seed_3(given):
        if given.directory.parent.name == "3":
            raise ValueError("no memory left")
        return local(given)

    monkeypatch.setattr(RunStore, "on_round", fail)
    monkeypatch.setitem(arms._ARMS, "local", fail_in_seed_3)
    flags = ("--num_rounds", "1", "--seeds", "1,2,3", "--compare", "local")
    done = run_here(LORA, *tiny(LORA), "--output_dir", "out", *flags)
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("error: 2 of 3 seeds failed: seed 2: round 1 failed 3 times")
    top = summary(tmp_path / "out")
    assert [seed["status"] for seed in top["runs"]] == ["completed", "failed", "failed"]
    assert (top["seeds"], top["means_over_seeds"]) == ([1, 2, 3], [1])
    assert "too late" in top["runs"][1]["reason"]
    assert top["runs"][1]["where"] == "in round 1 of 1"
    assert "no memory left" in top["runs"][2]["reason"]
    assert top["runs"][2]["where"] == "in the arm local"
    seeds = [tmp_path / "out" / "seeds" / name for name in ("1", "2", "3")]
    assert top["arms"]["federated"]["eval_loss"] == eval_loss(seeds[0])
    assert [*summary(seeds[2])["arms"]] == ["federated"]
    assert tree(tmp_path / "out" / "adapter") == tree(seeds[0] / "adapter")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 3 seeds completed; seed 2 failed in round 1 of 1" in page
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run(*flags, "--resume")
    top = summary(tmp_path / "out")
    assert (top["status"], top["means_over_seeds"]) == ("completed", [1, 2, 3])


def test_a_resumed_run_reads_what_the_first_one_read(tmp_path, monkeypatch):
    """Another content of a file is refused by its name; nothing of the run is touched."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {i}.", "output": f"The number is {i}."} for i in range(40)]
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--train_file", "train.jsonl", "--eval_file", "eval.jsonl")
    words = (*tiny(LORA), "--num_rounds", "1", "--steps_per_round", "1")
    assert run_here(LORA, *words, *files, "--output_dir", "out").status == 0
    told = summary(tmp_path / "out")["data"]["files"]
    for name in ("train.jsonl", "eval.jsonl"):
        content = (tmp_path / name).read_bytes()
        assert told[name] == hashlib.sha256(content).hexdigest()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        before = tree(tmp_path / "out")
        done = run_here(LORA, *words, *files, "--output_dir", "out", "--resume")
        assert done.status == 2
        assert f"{name} has changed since the run in out began" in done.err
        assert tree(tmp_path / "out") == before
        (tmp_path / name).write_bytes(content)


def test_client_state_reset(run, tmp_path):
    run()
    run("--client_state", "reset", "--output_dir", "reset")
    kept, reset = eval_loss(tmp_path / "out"), eval_loss(tmp_path / "reset")
    assert reset[0] == kept[0]
    assert reset[2] != kept[2]


def test_fraction_train(run, tmp_path):
    run("--fraction_train", "0.5")
    lines = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["replies"]) for line in lines] == [1, 1]
    assert summary(tmp_path / "out")["arms"]["federated"]["samples"] == [0, 8, 16]


@pytest.mark.parametrize(
    "flags", ["--min_replies 2", "--label_smoothing_factor 0.1"], ids=["min_replies", "smoothing"]
)
def test_parity(flags, run, tmp_path):
    """Also where the federated arm needs more updates than parity's one client sends."""
    run(*flags.split(), "--compare", "parity")
    parity = summary(tmp_path / "out")["verdict"]["parity"]
    assert parity == {"identical": True, "first_diff_step": None}


DIVERGING = """
import runpy
from pathlib import Path

import torch
from transformers import TrainerCallback

import fedtune

given = runpy.run_path({recipe!r})
build_model = given["build_model"]


class Diverge(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **_):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, float("nan"))


def build_trainer(args, *rest):
    trainer = given["build_trainer"](args, *rest)
    if Path(args.training.output_dir).name in {names!r}:
        trainer.add_callback(Diverge())
    return trainer


fedtune.launch(build_model, build_trainer)
"""


def test_an_arm_that_diverges(run, tmp_path):
    """What the others say stays, and nothing that is written holds a NaN."""
    script = tmp_path / "diverging.py"
    names = ["centralized", "local-client-1"]
    script.write_text(DIVERGING.format(recipe=str(LORA), names=names))
    done = run("--compare", "centralized,local,centralized_large_batch", script=script)

    def no_nan(name):
        raise AssertionError(name)

    text = (tmp_path / "out" / "summary.json").read_text()
    result = json.loads(text, parse_constant=no_nan)
    arms, verdict = result["arms"], result["verdict"]
    assert arms["centralized"]["eval_loss"][1:] == [None, None]
    assert arms["local"]["eval_loss"][1:] == [None, None]
    one, two = (client["eval_loss"] for client in arms["local"]["clients"])
    assert None not in one
    assert two[1:] == [None, None]
    assert verdict["gap_centralized_pct"] == {"mean": None, "std": None}
    assert verdict["gain_over_local_pct"] == {"mean": None, "std": None}
    assert math.isfinite(verdict["gap_large_batch_pct"]["mean"])
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "nan" not in done.out.lower()
    assert "\ncentralized: diverged" in done.out
    kept = {path.parent.name for path in (tmp_path / "out" / "arms").glob("*/adapter")}
    assert kept == {"local", "centralized_large_batch"}


METHODS = ("dora", "ia3", "p_tuning", "prompt_tuning", "prefix_tuning", "none")


@pytest.mark.parametrize(
    "script",
    [path for path in RECIPES if path != MIXED],  # FlexLoRA is for LoRA alone
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize("method", METHODS)
def test_peft_methods(method, script, run, tmp_path):
    run("--peft_method", method, "--num_rounds", "1", script=script)
    before, after = eval_loss(tmp_path / "out")
    assert math.isfinite(after)
    assert after != before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("model" in names, "adapter" in names) == (method == "none", method != "none")


def test_client_ranks(run, tmp_path):
    """Each client's rank and bytes are said before; a method that averages runs as well."""
    out = run("--dry_run", script=MIXED).out
    assert "ranks      client-0 2 (0.033 MB), client-1 4 (0.065 MB)" in out
    assert "travels    42 tensors, 0.033 to 0.065 MB" in out
    assert "0.196 MB in both directions" in out
    run("--strategy", "flora", script=MIXED)
    line = json.loads((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()[-1])
    assert line["residual"] < 1e-6 < line["residual_fedavg"]


def test_4bit(run, tmp_path):
    run("--load_in_4bit", "--num_rounds", "1")
    before, after = eval_loss(tmp_path / "out")
    assert math.isfinite(after)
    assert after != before


def test_start_from_an_adapter(run, tmp_path):
    run("--num_rounds", "1")
    run("--num_rounds", "1", "--init_adapter", "out/adapter", "--output_dir", "next")
    for path in (tmp_path / "out" / "adapter").glob("fedtune_*"):
        path.unlink()  # what is left is PEFT's own
    run("--num_rounds", "1", "--init_adapter", "out/adapter", "--output_dir", "plain")
    end = eval_loss(tmp_path / "out")[-1]
    for name in ("next", "plain"):
        assert eval_loss(tmp_path / name)[0] == pytest.approx(end)


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    run("--track", "tensorboard", "--num_rounds", "1")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("flag", ["--text_column", "--label_column"])
def test_columns_by_name(flag, run, tmp_path):
    """A labelled file with names of its own."""
    rows = [{"quote": f"a lovely day {i}", "mood": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["--text_column", "quote", "--label_column", "mood", "--train_file", "rows.jsonl"]
    run(*names, "--num_rounds", "1", script=recipe("seq_cls_lora"))
    without = [name for name in names if name not in (flag, names[names.index(flag) + 1])]
    done = run(*without, "--output_dir", "two", script=recipe("seq_cls_lora"), refused=True)
    assert flag in done.err
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_the_demo_shows_a_gain(script, tmp_path, monkeypatch):
    """Better than the initial adapter, and than each client alone."""
    monkeypatch.chdir(tmp_path)
    flags = ["--config", str(demo_of(script)), "--compare", "local", "--output_dir", "out"]
    assert run_here(script, *flags).status == 0
    arms = summary(tmp_path / "out")["arms"]
    first, last = (arms["federated"]["eval_loss"][i] for i in (0, -1))
    assert last < 0.7 * first
    assert last < 0.7 * arms["local"]["eval_loss"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_real_text_and_a_pretrained_model(script, run, tmp_path, shared):
    run(
        *("--train_file", shared / "data" / "financial_phrasebank.jsonl", "--max_rows", "400"),
        *("--model_name_or_path", shared / "models" / "stories260k", "--partition", "dirichlet"),
        script=script,
    )
    losses = eval_loss(tmp_path / "out")
    assert losses[-1] < losses[0]
