"""The arms that a federated run is compared with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.recount import oracle
from tests.recount.federated import asked, in_place, in_rounds, known_rows
from tests.recount.recorder import Step
from tests.recount.recount import LOSS, Recount


def trained(it: Recount, arm: str, name: str) -> list[Step]:
    place = it.root / "arms" / arm / "work" / name
    (train,) = in_place(it.run.recording.trains, place)
    return train.steps


def centralized(it: Recount) -> None:
    pooled(it, "centralized", it.setting.batch)


def centralized_large_batch(it: Recount) -> None:
    pooled(it, "centralized_large_batch", it.setting.batch * asked(it.run))


def pooled(it: Recount, arm: str, batch: int) -> None:
    steps, said = trained(it, arm, arm), it.series(arm)
    ours = series_of_steps(it, arm, steps, said)
    it.expect(f"{arm}: begins as federated", oracle.same(steps[0].before, it.start), True)
    full = batch * it.setting.accumulation
    if not it.setting.packed:
        it.expect(f"{arm}: rows of a step", max(len(s.rows) for s in steps), full)
        if not it.setting.drop_last:
            seen = Counter(row for step in steps for row in step.rows)
            it.in_turn(arm, seen, len(known_rows(it.run)))
    samples = sum(len(part.rows) for parts in it.rounds for part in parts)
    seen = sum(len(step.rows) for step in steps)
    widest = max(len(step.rows) for step in steps)
    if abs(samples - seen) > widest:
        it.found.append(f"{arm}: {seen} samples where federated has {samples}")
    if len(it.setting.sizes) == 1:
        one_client_is(it, arm, steps)
    it.losses[arm] = ours


def one_client_is(it: Recount, arm: str, steps: Sequence[Step]) -> None:
    """Nothing is averaged, so it is that arm to the bit: rows, rates, tensors, losses."""
    ours = [step for parts in it.rounds for step in parts[0].steps]
    it.expect(f"{arm}: steps of one client", len(steps), len(ours))
    same = [
        a.rows == b.rows and a.lr == b.lr and oracle.same(a.after, b.after)
        for a, b in zip(ours, steps, strict=False)
    ]
    if not all(same):
        it.found.append(f"{arm}: one client differs in step {same.index(False) + 1}")
    for key in ("eval_loss", "samples", "tokens"):
        mine = it.series("federated")[key]
        it.expect(f"{arm}: {key} of one client", it.series(arm)[key], mine)


def series_of_steps(
    it: Recount, arm: str, steps: Sequence[Step], said: dict[str, Any]
) -> list[float]:
    """Each value of a series is of one moment: the tensors there give its loss."""
    it.descends(arm, steps, 0, len(steps))
    ours = [it.own_loss(steps[0].before)]
    moments, samples = {}, 0
    for index, step in enumerate(steps):
        samples += len(step.rows)
        moments[samples] = index
    it.expect(f"{arm}: last samples", said["samples"][-1], samples)
    before = 0
    for number, count in enumerate(said["samples"][1:], 1):
        if count not in moments:
            it.found.append(f"{arm}: samples[{number}] says {count}, no step ends there")
            ours.append(math.nan)
            continue
        index = moments[count]
        tokens = sum(step.label_tokens for step in steps[: index + 1])
        it.expect(f"{arm}: tokens[{number}]", said["tokens"][number], tokens)
        ours.append(it.own_loss(steps[index].after))
        if it.knows_train_loss and index >= before:
            mine = it.train_loss(steps[before : index + 1])
            it.expect(f"{arm}: train_loss[{number}]", said["train_loss"][number], mine, LOSS)
        before = index + 1
    it.same_losses(arm, said["eval_loss"], ours)
    return ours


def local(it: Recount) -> None:
    said = it.run.summary["arms"]["local"]["clients"]
    names = [row["client"] for row in it.run.summary["data"]["clients"]]
    it.expect("local: clients", [row["client"] for row in said], names)
    own = []
    for row in said:
        steps = trained(it, "local", f"local-{row['client']}")
        if len(it.setting.seeds) == 1:
            own.append(series_of_steps(it, f"local {row['client']}", steps, row))
    if own:
        means = [sum(values) / len(values) for values in zip(*own, strict=True)]
        it.same_losses("local", it.series("local")["eval_loss"], means)
        it.losses["local"] = means
        kept = it.disk_loss(it.root / "arms" / "local" / "adapter")
        it.expect("local: the adapter kept", kept, min(run[-1] for run in own), LOSS)


def fixed_global(it: Recount) -> None:
    place = it.root / "arms" / "fixed_global" / "work"
    rounds = in_rounds(in_place(it.run.recording.trains, place), asked(it.run))
    said = it.series("fixed_global")
    for number, parts in enumerate(rounds, 1):
        alike = all(oracle.same(part.start, it.start) for part in parts)
        it.expect(f"fixed_global: round {number} begins at the start", alike, True)
    flat = [it.own_loss(it.start)] * (len(rounds) + 1)
    it.same_losses("fixed_global", said["eval_loss"], flat)
    samples = sum(len(part.rows) for parts in rounds for part in parts)
    it.expect("fixed_global: samples", said["samples"][-1], samples)


def parity(it: Recount) -> None:
    place = it.root / "arms" / "parity" / "work"
    trains = in_place(it.run.recording.trains, place)
    ours = [s for t in trains if Path(t.place).name != "plain" for s in t.steps]
    (plain,) = [t.steps for t in trains if Path(t.place).name == "plain"]
    same = [
        oracle.same(a.after, b.after) and a.rows == b.rows
        for a, b in zip(ours, plain, strict=False)
    ]
    identical = len(ours) == len(plain) and all(same)
    it.expect("parity holds", identical, True)
    said = it.run.summary["verdict"]["parity"]
    if len(it.setting.seeds) == 1:
        it.expect("parity is said to hold", said["identical"], identical)


CHECKS = {
    "centralized": centralized,
    "centralized_large_batch": centralized_large_batch,
    "local": local,
    "fixed_global": fixed_global,
    "parity": parity,
}


def check_arms(it: Recount) -> None:
    """Every arm that was asked for."""
    for arm in filter(None, it.setting.arms.split(",")):
        CHECKS[arm](it)
