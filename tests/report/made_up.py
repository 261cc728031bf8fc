"""A made-up but realistic run: all arms, 3 seeds, 4 clients, 10 rounds, hostile names."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

HOSTILE = '<script>alert("x")</script>'
ROUNDS, CLIENTS, STEP_SAMPLES = 10, 4, 640
CLIENT_BYTES = {
    "bytes_up": 329_780,
    "bytes_down": 329_780,
    "bytes_up_raw": 1_310_720,
    "bytes_down_raw": 1_310_720,
}


def made_up_series(
    end: float, *, seed: int, rounds: int = ROUNDS, wire: bool = True
) -> dict[str, Any]:
    """Loss that decays from 2.912 to about `end`; 4 clients, an int8 codec."""
    rng = random.Random(seed)
    shift = rng.gauss(0, 0.006)
    loss = [2.912] + [
        end + shift + (2.912 - end) * math.exp(-0.42 * r) + rng.gauss(0, 0.003)
        for r in range(1, rounds + 1)
    ]
    steps = range(rounds + 1)
    raw = [1_310_720] + [5_242_880] * rounds
    return {
        "eval_loss": loss,
        "train_loss": [None, *(value - 0.05 for value in loss[1:])],
        "samples": [r * STEP_SAMPLES * CLIENTS for r in steps],
        "tokens": [r * STEP_SAMPLES * CLIENTS * 118 for r in steps],
        "bytes_up": [0, *(n // 4 + 2100 for n in raw[1:])] if wire else [0 for _ in steps],
        "bytes_down": [n // 4 + 2100 for n in raw] if wire else [0 for _ in steps],
        "bytes_up_raw": [0, *raw[1:]] if wire else [0 for _ in steps],
        "bytes_down_raw": raw if wire else [0 for _ in steps],
        "wall_s": [0.8] + [21.3 + rng.random() for _ in range(rounds)],
    }


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def column(values: tuple[Any, ...]) -> float | None:
        return None if None in values else sum(values) / len(values)

    return {key: [column(c) for c in zip(*(r[key] for r in runs), strict=True)] for key in runs[0]}


def arm(end: float, seed: int, *, rounds: int, wire: bool = False) -> dict[str, Any]:
    runs = [made_up_series(end, seed=seed + i, rounds=rounds, wire=wire) for i in range(3)]
    return {**mean_of(runs), "runs": runs}


def spread(federated: dict[str, Any], other: dict[str, Any], sign: int) -> dict[str, float]:
    pairs = zip(federated["runs"], other["runs"], strict=True)
    finals = [(f["eval_loss"][-1], o["eval_loss"][-1]) for f, o in pairs]
    values = [sign * 100 * (o - f) / o for f, o in finals]
    return {"mean": statistics.mean(values), "std": statistics.stdev(values)}


def made_up_summary(rounds: int = ROUNDS) -> dict[str, Any]:
    federated = arm(2.451, 1, rounds=rounds, wire=True)
    fixed = arm(2.5, 30, rounds=rounds, wire=True)
    for series in (fixed, *fixed["runs"]):
        series["eval_loss"] = [2.912] * (rounds + 1)
    clients = [
        made_up_series(end, seed=50 + i, rounds=rounds, wire=False)
        for i, end in enumerate((2.55, 2.58, 2.62, 2.71))
    ]
    for client in clients:
        client["samples"] = [value // CLIENTS for value in client["samples"]]
    local = mean_of(clients)
    arms = {
        "federated": federated,
        "centralized": arm(2.426, 10, rounds=rounds),
        "centralized_large_batch": arm(2.447, 20, rounds=rounds),
        "local": {**local, "runs": [local] * 3, "clients": clients},
        "fixed_global": fixed,
    }
    return {
        "arms": arms,
        "strategy": "fedprox+fedadam",
        "codec": "int8",
        "codec_on": "delta",
        "codec_direction": "both",
        "error_feedback": True,
        "seeds": [1, 2, 3],
        "verdict": {
            "gap_centralized_pct": spread(federated, arms["centralized"], -1),
            "gap_large_batch_pct": spread(federated, arms["centralized_large_batch"], -1),
            "gain_over_local_pct": spread(federated, arms["local"], 1),
            "parity": {"identical": True, "first_diff_step": None},
            "bytes_ratio_full": 0.0042,
            "time_split": {"train": 171.2, "wait": 18.1, "codec": 6.3, "aggregate": 9.9},
        },
        "config": {
            "model": {"model_name_or_path": "models/stories260k"},
            "federation": {
                "num_clients": CLIENTS,
                "num_rounds": rounds,
                "strategy_args": "mu=0.01",
            },
            "transport": {"codec": "int8", "codec_on": "delta"},
            "run": {"output_dir": "runs/" + "a-very-long-directory-name-" * 6},
        },
        "versions": {"fedtune": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0", HOSTILE: "1"},
        "data": {
            "clients": [
                {
                    "client": HOSTILE,
                    "rows": 812,
                    "tokens": 95_120,
                    "labels": {"positive": 500, "neutral": 212, "negative": 100},
                },
                {
                    "client": "clinic-b",
                    "rows": 640,
                    "tokens": 74_300,
                    "labels": {"positive": 90, "neutral": 450, "negative": 100},
                },
                {
                    "client": "clinic-c",
                    "rows": 1204,
                    "tokens": 141_002,
                    "labels": {"positive": 300, HOSTILE: 504, "negative": 400},
                },
                {"client": "clinic-d", "rows": 96, "tokens": 11_040, "labels": {"negative": 96}},
            ]
        },
    }


def made_up_rounds(summary: dict[str, Any]) -> list[dict[str, Any]]:
    losses = summary["arms"]["federated"]["eval_loss"]
    lines = []
    for number in range(1, len(losses)):
        lines.append(
            {
                "round": number,
                "attempt": 2 if number == 7 else 1,
                "eval_loss": losses[number],
                "replies": [{"client": f"clinic-{k}"} for k in range(CLIENTS - (number == 4))],
                "failed_attempts": [],
                "refused": [],
                "update_norm": 0.8 / number,
                "client_drift": 0.31 + 0.01 * number,
                "residual": 1.2e-3 * number,
                "time": {"train": 17.4, "wait": 1.6, "codec": 0.62, "aggregate": 0.94},
                "bytes_up": 5_251_280,
                "bytes_down": 5_251_280,
                "clients": dict.fromkeys((HOSTILE, "clinic-b", "clinic-c"), CLIENT_BYTES),
            }
        )
    if len(lines) > 6:
        reason = "q_proj.lora_A: expected (8, 64), received (4, 64) <img src=x onerror=alert(1)>"
        lines[3]["refused"] = [{"node": 17, "client": HOSTILE, "reason": reason}]
        reason = "update has NaN in base_model.model.lm_head"
        failed = {"node": 4, "client": "clinic-d", "reason": reason}
        lines[6]["failed_attempts"] = [{"reason": "3 of 4 needed", "refused": [failed]}]
    return lines


def write_run(directory: Path, summary: dict[str, Any], rounds: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    return directory
