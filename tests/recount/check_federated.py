"""The federated arm's figures, round by round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.recount import oracle
from tests.recount.federated import Part, encoder_of, kept_rows, known_rows
from tests.recount.recount import LOSS, Recount

# A codec's rounding, of differences and so of losses.
CODED = 2e-3


def check_federated(it: Recount) -> None:
    """Counts, rows, learning rates, means, losses, data, bytes and `best/`."""
    for check in (
        federated_counts,
        rows_seen,
        schedule,
        aggregate,
        federated_losses,
        data,
        traffic,
        best,
    ):
        check(it)


def federated_counts(it: Recount) -> None:
    said, samples, tokens = it.series("federated"), 0, 0
    it.expect("federated rounds", len(said["samples"]) - 1, len(it.rounds))
    lines = it.run.rounds(it.seed)
    for number, parts in enumerate(it.rounds, 1):
        samples += sum(len(part.rows) for part in parts)
        tokens += sum(part.label_tokens for part in parts)
        it.expect(f"federated samples[{number}]", said["samples"][number], samples)
        it.expect(f"federated tokens[{number}]", said["tokens"][number], tokens)
        replies = {reply["client"]: reply for reply in lines[number]["replies"]}
        it.expect(f"who replied in {number}", set(replies) == {p.client for p in parts}, True)
        for part in parts:
            reply, where = replies[part.client], f"round {number}, {part.client}"
            it.expect(f"{where}: examples", reply["examples"], len(part.rows))
            it.expect(f"{where}: tokens", reply["tokens"], part.label_tokens)
            it.expect(f"{where}: steps", reply["steps"], len(part.steps))
        times = lines[number]["time"]
        it.expect(f"seconds of round {number}", all(s >= 0 for s in times.values()), True)
        # each part is rounded to 1e-4
        longer = sum(times.values()) - lines[number]["wall_s"] > 1e-3
        it.expect(f"the parts of round {number} take longer than it", longer, False)


def rows_seen(it: Recount) -> None:
    """Only rows of one's own; each once before any comes again."""
    known = known_rows(it.run)
    seen: dict[str, Counter[Any]] = {}
    for part in (part for parts in it.rounds for part in parts):
        seen.setdefault(part.client, Counter()).update(part.rows)
    if not it.setting.packed:  # rows of a line are cut there
        strange = [row for rows in seen.values() for row in rows if row not in known]
        it.expect("rows that were not given", len(strange), 0)
    for name, rows in seen.items():
        others = {row for other, r in seen.items() if other != name for row in r}
        it.expect(f"rows of {name} that others have", len(others & rows.keys()), 0)
        owned = it.client_row(name)["owned"]
        if owned and every_row_in_turn(it):
            it.in_turn(name, rows, kept_rows(it.run, owned[0]))


def every_row_in_turn(it: Recount) -> bool:
    return it.setting.carry and not it.setting.drop_last and not it.setting.packed


def schedule(it: Recount) -> None:
    """One linear descent over the rounds; as many steps as asked for."""
    for number, parts in enumerate(it.rounds):
        for part in parts:
            steps = steps_of(it, part)
            it.expect(f"round {number + 1}, {part.client}: steps", len(part.steps), steps)
            it.descends(
                f"round {number + 1}, {part.client}",
                part.steps,
                number * steps,
                steps * it.setting.rounds,
            )


def steps_of(it: Recount, part: Part) -> int:
    setting = it.setting
    if setting.steps:
        return setting.steps
    if setting.packed:
        return len(part.steps)
    kept = kept_rows(it.run, it.client_row(part.client)["owned"][0])
    return oracle.steps_per_round(
        kept, setting.batch, setting.accumulation, setting.epochs, setting.drop_last
    )


def aggregate(it: Recount) -> None:
    """All begin a round alike, and with the mean of what the last one sent."""
    for number, parts in enumerate(it.rounds):
        if not it.setting.codec and not it.setting.wide:
            alike = all(oracle.same(part.start, parts[0].start) for part in parts)
            it.expect(f"round {number + 1} begins alike", alike, True)
        if number and it.setting.mean:
            mean = it.mean_of(it.rounds[number - 1])
            off = oracle.furthest(mean, parts[0].start)
            # 2^-23: one rounding of the mean; a codec rounds the differences, both ways
            limit = 0.02 if it.setting.codec else 2**-23
            if off > limit:
                it.found.append(f"round {number + 1} begins {off:.1e} off the mean")
        if it.setting.mean and not it.setting.codec:
            movement(it, number + 1, parts)


def movement(it: Recount, number: int, parts: Sequence[Part]) -> None:
    """Norm of the mean update d, and spread of the clients' around it: sum p|d_k|^2 - |d|^2."""
    line = it.run.rounds(it.seed)[number]
    weights = [part.weight(it.setting.weight_by) for part in parts]
    squares = [oracle.squared(oracle.minus(part.end, part.start)) for part in parts]
    moved = oracle.squared(oracle.minus(it.mean_of(parts), parts[0].start))
    mean = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
    it.expect(f"update_norm of round {number}", line["update_norm"], math.sqrt(moved), 1e-5)
    drift = math.sqrt(max(0.0, mean - moved))
    it.expect(f"client_drift of round {number}", line["client_drift"], drift, 1e-4)
    apart = oracle.residual([part.end for part in parts], weights)
    if apart is not None:
        it.expect(f"residual of round {number}", line["residual"], apart, 1e-4)


def federated_losses(it: Recount) -> None:
    said, lines = it.series("federated"), it.run.rounds(it.seed)
    if it.setting.only_last:
        last = it.disk_loss(it.root / "adapter")
        it.expect("the last eval_loss", said["eval_loss"][-1], last, LOSS)
        it.losses["federated"] = [*said["eval_loss"][:-1], last]
        return
    # of clients with different ranks the last has the highest: the others get a part of the global
    scores = [it.own_score(parts[-1].start) for parts in it.rounds]
    ours = [score.loss for score in scores]
    for key in ("eval_mean_token_accuracy", "eval_accuracy"):
        for one, score in zip(said.get(key, ()), scores, strict=False):
            it.expect(f"federated: {key}", one, score.accuracy, 1e-6)
    ours.append(it.disk_loss(it.root / ("model" if it.setting.full else "adapter")))
    it.losses["federated"] = ours
    limit = CODED if it.setting.codec else LOSS
    it.same_losses("federated", said["eval_loss"], ours, limit)
    if it.setting.mean and not it.setting.codec:
        it.expect("the last mean", it.own_loss(it.mean_of(it.rounds[-1])), ours[-1], LOSS)
    if not it.knows_train_loss:
        return
    for number, parts in enumerate(it.rounds, 1):
        replies = {reply["client"]: reply for reply in lines[number]["replies"]}
        losses = {p.client: it.train_loss(p.steps) for p in parts}
        for part in parts:
            where, mine = f"round {number}, {part.client}", losses[part.client]
            it.expect(f"{where}: train_loss", replies[part.client]["train_loss"], mine, LOSS)
        tokens = sum(p.label_tokens for p in parts)
        mean = sum(losses[p.client] * p.label_tokens for p in parts) / tokens
        it.expect(f"train_loss[{number}]", said["train_loss"][number], mean, LOSS)


def data(it: Recount) -> None:
    for row in it.run.summary["data"]["clients"]:
        if not row["owned"]:
            continue
        rows = [r for r in it.run.corpus.train if r["silo"] == row["owned"][0]]
        it.expect(f"rows of {row['client']}", row["rows"], len(rows))
        if not it.setting.packed:
            coded = encoder_of(it.run).all(rows)
            tokens = sum(len(one.ids) for one in coded)
            it.expect(f"tokens of {row['client']}", row["tokens"], tokens)


def traffic(it: Recount) -> None:
    """Raw bytes are the trained tensors of all who took part, in records of a few more."""
    said, ours = it.series("federated"), oracle.size(it.start)
    if it.setting.wide:  # what travels is cut to the client's rank
        return
    frame = 2_000 + 400 * len(it.start)
    for key in ("bytes_up_raw", "bytes_down_raw"):
        for number, parts in enumerate(it.rounds, 1):
            first = key == "bytes_down_raw" and number == 1
            copies = 1 if first else 1 + it.setting.extras
            sent = said[key][number] / len(parts) / copies - ours
            if not 0 <= sent <= frame:
                it.found.append(f"{key}[{number}]: {sent} bytes a client beside its tensors")
    if it.setting.codec:  # int8: 1 byte a value and its block's scale; round 1 is sent down whole
        for key in ("bytes_up", "bytes_down"):
            share = said[key][-1] / said[f"{key}_raw"][-1]
            it.expect(f"{key}: share {share}", 0.25 < share < 0.35, True)
    else:
        for key in ("bytes_up", "bytes_down"):
            it.expect(key, said[key], said[f"{key}_raw"])


def best(it: Recount) -> None:
    ours = it.losses["federated"]
    lowest = min(range(len(ours)), key=ours.__getitem__)
    folder = it.root / "best"
    if folder.is_dir():
        limit = CODED if it.setting.codec else LOSS
        it.expect("loss of best/", it.disk_loss(folder), ours[lowest], limit)
    else:
        it.expect("best/ is absent, the best round", lowest, 0)
