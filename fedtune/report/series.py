"""Read what a run left on disk: `summary.json` and `rounds.jsonl`.

Every number that is missing, null, NaN or infinite becomes None, so that readers test one thing.
A line of `rounds.jsonl`: {"round", "attempt", "eval_loss", "replies": [...], "refused": [{"node",
"client", "reason"}], "failed_attempts": [{"refused": [...]}], "update_norm", "client_drift",
"residual", "time": {"train", "wait", "codec", "aggregate", ...} in s, "bytes_up", "bytes_down",
"clients": {name: {"bytes_up", "bytes_down", "bytes_up_raw", "bytes_down_raw"}}}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.report.records import (
    Arm,
    ClientData,
    OwnRow,
    Parity,
    Refusal,
    RoundRow,
    Series,
    Spread,
    Summary,
    Verdict,
    WireBytes,
    last,
)

__all__ = ["load_rounds", "load_summary", "mean", "number", "refusal_of", "rounds_file"]

SERIES = tuple(name for name in Series.__annotations__ if name != "metrics")
KNOWN = {*SERIES, "runs", "clients", "time"}  # other lists of an arm are task metrics
TIME_PARTS = ("train", "wait", "codec", "aggregate")


def load_summary(directory: str | Path) -> Summary:
    """Read `directory/summary.json`."""
    path = Path(directory) / "summary.json"
    if not path.is_file():
        raise FedtuneError(
            f"{directory}: expected the output directory of a finished run, found no summary.json. "
            "Pass the --output_dir of a run that ended."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unknown(path, f"JSON, received {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("arms"), dict):
        raise _unknown(path, 'an object with "arms"')
    arms = {str(name): _arm(str(name), arm, path) for name, arm in raw["arms"].items()}
    if not arms and raw.get("status") not in (None, "completed"):
        arms = {"federated": Arm("federated", Series())}
    elif "federated" not in arms or not arms["federated"].mean.eval_loss:
        raise _unknown(path, 'an arm "federated" with "eval_loss"')
    known = {"arms", "verdict", "config", "versions", "data", "model", "base_loss"}
    return Summary(
        directory=Path(directory),
        arms=arms,
        verdict=_verdict(_mapping(raw.get("verdict"))),
        config=_mapping(raw.get("config")),
        versions=_mapping(raw.get("versions")),
        clients=_clients(_mapping(raw.get("data")).get("clients")),
        data=_mapping(raw.get("data")),
        model=_mapping(raw.get("model")),
        notes=tuple(map(str, _items(_mapping(raw.get("data")).get("notes")))),
        extra={key: value for key, value in raw.items() if key not in known},
        base_loss=number(raw.get("base_loss")),
    )


def load_rounds(directory: str | Path) -> list[RoundRow]:
    """Read `rounds.jsonl`; over several seeds, the first one's. Empty when none exists."""
    path = rounds_file(Path(directory))
    if path is None:
        return []
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    rows = []
    for index, line in enumerate(lines):
        try:
            rows.append(_round(_mapping(json.loads(line.decode()))))
        except ValueError as error:
            if index == len(lines) - 1:  # a killed run may leave half a line
                break
            raise _unknown(path, f"JSON on line {index + 1}, received {error}") from None
    return rows


def rounds_file(directory: Path) -> Path | None:
    """The `rounds.jsonl` that `load_rounds` reads."""
    seeds = sorted(directory.glob("seeds/*/rounds.jsonl"), key=lambda p: _seed(p.parent.name))
    return next((p for p in (directory / "rounds.jsonl", *seeds) if p.is_file()), None)


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _unknown(path: Path, expected: str) -> FedtuneError:
    return FedtuneError(f"{path}: expected {expected}. Was it written by another version?")


def _seed(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (1 << 62, name)


def _mapping(value: object) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _series(raw: Mapping[str, Any]) -> Series:
    columns = {key: tuple(map(number, item)) for key, item in raw.items() if isinstance(item, list)}
    metrics = {
        key: columns[key] for key in columns if key not in KNOWN and last(columns[key]) is not None
    }
    return Series(**{key: columns.get(key, ()) for key in SERIES}, metrics=metrics)


def _arm(name: str, raw: object, path: Path) -> Arm:
    if not isinstance(raw, dict):
        raise _unknown(path, f'arm "{name}" to be an object')

    def many(key: str) -> tuple[Series, ...]:
        return tuple(_series(_mapping(item)) for item in _items(raw.get(key)))

    return Arm(name, _series(raw), many("runs"), many("clients"))


def _verdict(raw: Mapping[str, Any]) -> Verdict:
    parity = _mapping(raw.get("parity"))
    step = number(parity.get("first_diff_step"))
    return Verdict(
        gap_centralized_pct=_spread(raw.get("gap_centralized_pct")),
        gap_large_batch_pct=_spread(raw.get("gap_large_batch_pct")),
        gain_over_local_pct=_spread(raw.get("gain_over_local_pct")),
        equal_samples={
            arm: equal is True for arm, equal in _mapping(raw.get("equal_samples")).items()
        },
        gain_over_local_own_pct=_spread(raw.get("gain_over_local_own_pct")),
        own=_own(_mapping(raw.get("gain_over_local_own_pct")).get("clients")),
        parity=Parity(parity["identical"] is True, None if step is None else int(step))
        if parity.get("identical") is not None
        else None,
        bytes_ratio_full=number(raw.get("bytes_ratio_full")),
        time_split=_times(raw.get("time_split")),
    )


def _own(raw: object) -> tuple[OwnRow, ...]:
    losses = ("rows", "local", "federated", "centralized", "gain_pct")
    return tuple(
        OwnRow(str(item.get("client", index)), *(number(item.get(name)) for name in losses))
        for index, item in enumerate(map(_mapping, _items(raw)))
    )


def _spread(raw: object) -> Spread | None:
    spread = (
        Spread(number(raw.get("mean")), number(raw.get("std")))
        if isinstance(raw, dict)
        else Spread(number(raw))
    )
    return None if spread.mean is None else spread


def _times(raw: object) -> dict[str, float]:
    """Seconds (or shares) by part, the four known parts first; `train_s` is `train`."""
    found = {key.removesuffix("_s"): number(value) for key, value in _mapping(raw).items()}
    order = [*TIME_PARTS, *(key for key in found if key not in TIME_PARTS)]
    return {key: value for key in order if (value := found.get(key)) is not None}


def _clients(raw: object) -> tuple[ClientData, ...]:
    return tuple(
        ClientData(
            client=str(item.get("client", index)),
            rows=number(item.get("rows")),
            tokens=number(item.get("tokens")),
            labels={k: n for k, v in _mapping(item.get("labels")).items() if (n := number(v))},
            owned=tuple(map(str, _items(item.get("owned")))),
        )
        for index, item in enumerate(map(_mapping, _items(raw)))
    )


def _round(raw: Mapping[str, Any]) -> RoundRow:
    attempt = _count(raw.get("attempt"))
    tries = [_mapping(item).get("refused") for item in _items(raw.get("failed_attempts"))]
    tried = [*enumerate(tries, start=1), (attempt or len(tries) + 1, raw.get("refused"))]
    refused = [refusal_of(item, number) for number, items in tried for item in _items(items)]
    return RoundRow(
        round=_count(raw.get("round")),
        attempt=attempt,
        eval_loss=number(raw.get("eval_loss")),
        asked=_count(raw.get("asked")),
        replies=_count(raw.get("replies")),
        refused=tuple(refused),
        update_norm=_scalar(raw.get("update_norm")),
        client_drift=_scalar(raw.get("client_drift")),
        residual=_scalar(raw.get("residual", raw.get("aggregation_residual"))),
        time_split=_times(raw.get("time_split", raw.get("time"))),
        bytes_up=number(raw.get("bytes_up")),
        bytes_down=number(raw.get("bytes_down")),
        clients={
            name: _traffic(_mapping(item)) for name, item in _mapping(raw.get("clients")).items()
        },
    )


def _traffic(raw: Mapping[str, Any]) -> WireBytes:
    names = ("bytes_up", "bytes_down", "bytes_up_raw", "bytes_down_raw")
    return WireBytes(*(number(raw.get(name)) for name in names))


def _count(value: object) -> int | None:
    if isinstance(value, list | dict):
        return len(value)
    found = number(value)
    return None if found is None else int(found)


def refusal_of(raw: object, attempt: int) -> Refusal:
    """One refused update, as `rounds.jsonl` and `summary.json` hold it."""
    if not isinstance(raw, dict):
        return Refusal(str(raw), "", attempt)
    client, node = raw.get("client"), raw.get("node")
    who = [str(client)] if client not in (None, "") else []
    who += [f"node {node}" if who else str(node)] if node not in (None, "") else []
    return Refusal(", ".join(who), str(raw.get("reason", "")), attempt)


def _scalar(value: object) -> float | None:
    """A number, the `mean` of an object, or the mean of its numbers (one per client)."""
    if not isinstance(value, dict | list):
        return number(value)
    if isinstance(value, dict) and "mean" in value:
        return number(value["mean"])
    return mean(value.values() if isinstance(value, dict) else value)


def mean(values: Iterable[object]) -> float | None:
    """Mean of the finite numbers; None when there is none."""
    known = [n for value in values if (n := number(value)) is not None]
    return sum(known) / len(known) if known else None
