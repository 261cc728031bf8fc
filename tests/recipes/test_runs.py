"""Each recipe run for real, from the command line: the files it leaves and what they hold."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedtune.config import ARMS

ROUNDS, CLIENTS = 2, 2
SERIES = {
    "eval_loss": float,
    "train_loss": float,
    "samples": (int, float),
    "tokens": (int, float),
    "bytes_up": (int, float),
    "bytes_down": (int, float),
    "bytes_up_raw": (int, float),
    "bytes_down_raw": (int, float),
    "wall_s": float,
}


def assert_series(series, *, federated):
    """One value per round and one before training; None only where there is nothing to say."""
    for name, kind in SERIES.items():
        values = series[name]
        assert len(values) == ROUNDS + 1, name
        start, *rounds = values
        assert isinstance(start, kind) or (name == "train_loss" and start is None), name
        for value in rounds:
            if name == "train_loss" and not federated:
                assert value is None or isinstance(value, float)
            else:
                assert isinstance(value, kind), name
                assert math.isfinite(value)
    assert series["samples"][0] == series["tokens"][0] == 0
    assert series["samples"] == sorted(series["samples"])
    assert series["tokens"] == sorted(series["tokens"])
    sent = [series[name][1:] for name in SERIES if name.startswith("bytes_")]
    assert all((value > 0) is federated for values in sent for value in values)
    for name, values in series.items():  # metrics of the recipe's own
        if name.startswith("eval_"):
            assert len(values) == ROUNDS + 1
            assert all(isinstance(value, float) for value in values)


def test_arms(finished):
    arms = finished.summary["arms"]
    assert set(arms) == {"federated", *ARMS} - {"parity"}
    for name, arm in arms.items():
        federated = name in ("federated", "fixed_global")
        assert_series(arm, federated=federated)
        assert len(arm["runs"]) == 1
        assert_series(arm["runs"][0], federated=federated)
    assert [client["client"] for client in arms["local"]["clients"]] == ["client-0", "client-1"]
    for client in arms["local"]["clients"]:
        assert_series(client, federated=False)
    steps = 2 * 4  # of a round: steps x batch
    assert arms["federated"]["samples"] == [0, CLIENTS * steps, ROUNDS * CLIENTS * steps]
    assert arms["local"]["samples"] == [0, steps, ROUNDS * steps]
    flat = arms["fixed_global"]["eval_loss"]
    assert flat == [flat[0]] * (ROUNDS + 1)
    starts = {arm["eval_loss"][0] for arm in arms.values()}
    assert max(starts) - min(starts) < 1e-6


def test_verdict(finished):
    verdict = finished.summary["verdict"]
    for row in ("gap_centralized_pct", "gap_large_batch_pct", "gain_over_local_pct"):
        assert isinstance(verdict[row]["mean"], float)
        assert verdict[row]["std"] is None  # one seed
    assert verdict["parity"] == {"identical": True, "first_diff_step": None}
    assert 0 < verdict["bytes_ratio_full"] < 1
    assert all(isinstance(seconds, float) for seconds in verdict["time_split"].values())
    assert {"train", "wait", "codec", "aggregate"} <= set(verdict["time_split"])


def test_settings(finished):
    summary = finished.summary
    strategy = "flexlora" if finished.script.stem == "mixed_ranks" else "fedavg"
    assert (summary["strategy"], summary["codec"], summary["seeds"]) == (strategy, "none", [42])
    assert summary["engine"] == "inline"
    assert {"model", "adapter", "data", "federation", "run", "training"} <= set(summary["config"])
    assert summary["config"]["federation"]["num_rounds"] == ROUNDS
    assert {"python", "fedtune", "torch", "transformers", "peft", "flwr"} <= set(
        summary["versions"]
    )
    clients = summary["data"]["clients"]
    assert sum(client["rows"] for client in clients) == 54  # of 60, a tenth held out
    assert all(client["tokens"] > 0 and sum(client["labels"].values()) for client in clients)


def test_rounds(finished):
    lines = (finished.directory / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["round"] for record in records] == [1, 2]
    for record in records:
        assert record["attempt"] == 1
        assert len(record["replies"]) == CLIENTS
        assert record["refused"] == []
        if finished.script.stem == "mixed_ranks":  # new factors in every round: no coordinates
            assert record["update_norm"] is None
            assert 0 <= record["residual"] < record["residual_fedavg"]
        else:
            assert record["update_norm"] > 0
        assert {"client_drift", "train_loss", "samples", "tokens"} <= set(record)
        assert {"train", "wait", "codec", "aggregate"} <= set(record["time"])
    federated = finished.summary["arms"]["federated"]
    assert [record["eval_loss"] for record in records] == federated["eval_loss"][1:]


def test_files(finished):
    names = {path.name for path in finished.directory.iterdir()}
    assert {"summary.json", "rounds.jsonl", "run.json", "loss.png", "report.html"} <= names
    assert {"adapter", "best", "arms", "checkpoints"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert (finished.directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (finished.directory / "report.html").read_text()
    assert report.lstrip().startswith("<!")
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report


def test_terminal(finished):
    out = finished.done.out
    assert "client-0" in out
    assert "gain" in out
    assert out.splitlines()[-1].endswith("report.html")
    assert "Traceback" not in finished.done.err
    assert "Warning" not in finished.done.err


@pytest.mark.parametrize("part", ["adapter", "best", *(f"arms/{arm}/adapter" for arm in ARMS)])
def test_checkpoints_load_with_plain_peft(finished, part):
    """No fedtune involved: base model from the path in the checkpoint, then PEFT's own loader."""
    directory = finished.directory / part
    config = PeftConfig.from_pretrained(directory)
    classes = AutoModelForCausalLM, {}
    if config.task_type == "SEQ_CLS":
        classes = AutoModelForSequenceClassification, {"num_labels": 3}
    kind, settings = classes
    base = kind.from_pretrained(config.base_model_name_or_path, **settings)
    tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)
    model = PeftModel.from_pretrained(base, directory).eval()
    batch = tokenizer("Text: It was a lovely day.\nSentiment:", return_tensors="pt")
    if config.task_type == "SEQ_CLS":
        base.config.pad_token_id = tokenizer.pad_token_id
        assert model(**batch).logits.shape == (1, 3)
        assert torch.isfinite(model(**batch).logits).all()
    else:
        written = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert written.shape[1] > batch["input_ids"].shape[1]
