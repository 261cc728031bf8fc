"""The verdict of a run and the words it is told in, from our own losses and counts."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.recount import oracle
from tests.recount.check_arms import trained
from tests.recount.federated import encoder_of
from tests.recount.recount import LOSS, Recount
from tests.recount.runs import Run

WORDS = {"centralized": "centralized", "centralized_large_batch": "centralized large batch"}
GAPS = {
    "gap_centralized_pct": ("centralized", lambda us, other: 100 * (us / other - 1)),
    "gap_large_batch_pct": ("centralized_large_batch", lambda us, other: 100 * (us / other - 1)),
    "gain_over_local_pct": ("local", lambda us, other: 100 * (1 - us / other)),
}
HEADLINE = r"Federated loss ends ([\d.]+) % (below|above) centralized([^.]*)"
# A loss off by 1e-5 of itself moves a percentage by 1e-3.
PERCENT = 5e-3


def check_verdict(run: Run, seeds: Sequence[Recount]) -> list[str]:
    """What is wrong in the verdict, the terminal's lines and the report."""
    found: list[str] = []
    said = run.summary["verdict"]
    for key, (arm, percent) in GAPS.items():
        if not all(arm in seed.losses for seed in seeds):
            continue
        values = [percent(s.losses["federated"][-1], s.losses[arm][-1]) for s in seeds]
        mean, std = oracle.spread(values)
        if abs(said[key]["mean"] - mean) > PERCENT:
            found.append(f"{key}: says {said[key]['mean']}, is {mean}")
        if (said[key]["std"] is None) != (std is None) or abs(
            (said[key]["std"] or 0) - (std or 0)
        ) > PERCENT:
            found.append(f"{key}: std says {said[key]['std']}, is {std}")
        shown = f"{said[key]['mean']:+.1f} %"
        for where, text in (("terminal", run.text), ("report", report_text(run.out))):
            if abs(mean) >= 0.1 and shown not in text:
                found.append(f"{key}: {shown} is not in the {where}")
        if arm in WORDS:
            found += _equal_samples(run, seeds, arm)
    found += _own_rows(run, seeds)
    found += _bytes(run, seeds)
    found += _base(run, seeds)
    found += _final_losses(run, seeds)
    return found


def report_text(out: Path) -> str:
    page = (out / "report.html").read_text()
    page = re.sub(r"(?s)<(script|style).*?</\1>", " ", page)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


def _equal_samples(run: Run, seeds: Sequence[Recount], arm: str) -> list[str]:
    """The words stand where the counts agree to a batch, and only there."""
    equal = True
    for seed in seeds:
        steps = trained(seed, arm, arm)
        ours = sum(len(part.rows) for parts in seed.rounds for part in parts)
        equal &= abs(ours - sum(len(s.rows) for s in steps)) <= max(len(s.rows) for s in steps)
    lines = [line for line in run.text.splitlines() if f"vs {WORDS[arm]} " in line]
    if not lines:
        return [f"{arm}: no line on the terminal"]
    printed = all("at equal samples" in line for line in lines)
    found = [] if printed == equal else [f'{arm}: "at equal samples" is {printed}, must be {equal}']
    said = run.summary["verdict"]["equal_samples"][arm]
    if said != equal:
        found.append(f"verdict: equal_samples of {arm} is {said}, must be {equal}")
    if arm == "centralized":
        found += _headline(run, seeds, equal=equal)
    return found


def _headline(run: Run, seeds: Sequence[Recount], *, equal: bool) -> list[str]:
    """`Federated loss ends 12.3 % above centralized at equal samples.`"""
    told = re.search(HEADLINE, report_text(run.out))
    if told is None:  # training made it worse, or the seeds differ by more
        return []
    size, side, more = told.groups()
    us, them = (
        sum(seed.losses[arm][-1] for seed in seeds) / len(seeds)
        for arm in ("federated", "centralized")
    )
    found = []
    gap = run.summary["verdict"]["gap_centralized_pct"]["mean"]
    if f"{abs(gap):.1f}" != size and abs(gap) >= 0.1:
        found.append(f"headline: says {size} %, is {gap:.1f}")
    if len(seeds) == 1 and side != ("above" if us > them else "below"):
        found.append(f"headline: says {side}, federated ends at {us}, centralized at {them}")
    if ("at equal samples" in more) != equal:
        found.append(f"headline: says {more}, equal samples is {equal}")
    return found


def _own_rows(run: Run, seeds: Sequence[Recount]) -> list[str]:
    """What each client's model, and everybody's, make of the held-out rows of its own silo."""
    said = run.summary["verdict"].get("gain_over_local_own_pct")
    owned = {row["client"]: row["owned"] for row in run.summary["data"]["clients"]}
    if "local" not in run.setting.arms or not all(owned.values()):
        return [] if said is None else [f"gain on own rows: says {said}, nobody has any"]
    if said is None:
        return ["gain on own rows: is not there"]
    found, gains = [], []
    for client in said["clients"]:
        (silo,) = owned[client["client"]]
        rows = [row for row in run.corpus.evaluation if row["silo"] == silo]
        losses = [_own_losses(seed, client["client"], rows) for seed in seeds]
        gain = [100 * (1 - loss["federated"] / loss["local"]) for loss in losses]
        gains.append(gain)
        ours = {arm: sum(loss[arm] for loss in losses) / len(losses) for arm in losses[0]}
        for key, value in {**ours, "rows": len(rows), "gain_pct": sum(gain) / len(gain)}.items():
            if not math.isclose(client[key], value, rel_tol=LOSS, abs_tol=PERCENT):
                where = f"{client['client']} on its own rows"
                found.append(f"{where}: {key} says {client[key]}, is {value}")
    mean, std = oracle.spread([sum(of) / len(of) for of in zip(*gains, strict=True)])
    if abs(said["mean"] - mean) > PERCENT or abs((said["std"] or 0) - (std or 0)) > PERCENT:
        found.append(f"gain on own rows: says {said['mean']}, {said['std']}, is {mean}, {std}")
    return found


def _own_losses(seed: Recount, client: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    ends = {
        "local": trained(seed, "local", f"local-{client}")[-1].after,
        "federated": seed.mean_of(seed.rounds[-1]),
    }
    if "centralized" in seed.losses:
        ends["centralized"] = trained(seed, "centralized", "centralized")[-1].after
    coded = encoder_of(seed.run).all(rows)
    return {
        arm: oracle.loss_per_token(
            seed.model, coded, tensors=tensors, smoothing=seed.setting.smoothing
        )
        for arm, tensors in ends.items()
    }


def _bytes(run: Run, seeds: Sequence[Recount]) -> list[str]:
    """Bytes that travelled / those of the base model's parameters, both ways, with as many."""
    values = []
    base = oracle.bare_model(len(run.setting.classes))
    full = sum(p.numel() * p.element_size() for p in base.parameters())
    seed = seeds[0]
    series = seed.series("federated")
    sent = sum(series["bytes_up"][1:]) + sum(series["bytes_down"][1:])
    exchanges = sum(len(parts) for parts in seed.rounds)
    values.append(sent / (2 * exchanges * full))
    said = run.summary["verdict"]["bytes_ratio_full"]
    return (
        []
        if abs(said / values[0] - 1) < 1e-3
        else [f"bytes_ratio_full: says {said}, is {values[0]}"]
    )


def _base(run: Run, seeds: Sequence[Recount]) -> list[str]:
    """The base model's own loss, beside that of the initial adapter."""
    if run.setting.classes:  # a new head is no part of the base
        return []
    if "base_loss" not in run.summary:
        return ["base_loss: is not there"]
    ours = oracle.loss_per_token(
        oracle.bare_model(), seeds[0].held_out, smoothing=run.setting.smoothing
    )
    said = run.summary["base_loss"]
    return [] if abs(said - ours) < LOSS else [f"base_loss: says {said}, is {ours}"]


def _final_losses(run: Run, seeds: Sequence[Recount]) -> list[str]:
    """The table on the terminal and in the report shows each arm's last loss."""
    found = []
    for arm in seeds[0].losses:
        values = [seed.losses[arm][-1] for seed in seeds if arm in seed.losses]
        shown = f"{sum(values) / len(values):.3f}"
        near = {shown, f"{float(shown) + 0.001:.3f}", f"{float(shown) - 0.001:.3f}"}
        for where, text in (("terminal", run.text), ("report", report_text(run.out))):
            if not any(value in text for value in near):
                found.append(f"{arm}: its last loss {shown} is not in the {where}")
    return found
