"""`summary.json`: all arms, the verdict, the data, the settings and the versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedtune.compare.facts import Facts
from fedtune.compare.series import mean_series
from fedtune.compare.verdict import own_gain, verdict
from fedtune.config import FederationArguments, TransportArguments, sampled_clients
from fedtune.strategies import strategy_of
from fedtune.transport.settings import CodecSettings

__all__ = ["SeedResult", "build_summary"]

NO_SERIES = ("clients", "time")

# One seed's arms: name -> its part of the summary ("federated" is always there).
SeedResult = Mapping[str, Mapping[str, Any]]


def build_summary(facts: Facts, results: Sequence[SeedResult]) -> dict[str, Any]:
    """The summary over those seeds that have `results`; series are means, `runs` one per seed."""
    return {
        "strategy": facts.federation.strategy,
        "engine": facts.federation.engine,
        **_codec(facts.federation, facts.transport),
        "seeds": facts.seeds,
        "base_loss": facts.base_loss,
        **(_measured(facts, results) if results else {"arms": {}, "verdict": {}}),
        "data": {
            **facts.identity.get("data", {}),
            "clients": facts.clients,
            "files": facts.files,
        },
        "model": facts.identity.get("model", {}),
        "config": facts.config,
        "versions": facts.versions,
    }


def _measured(facts: Facts, results: Sequence[SeedResult]) -> dict[str, Any]:
    sampled = sampled_clients(facts.federation.fraction_train, len(facts.clients))
    series = {
        name: [_plain_series(result[name]) for result in results]
        for name in results[0]
        if name != "parity"
    }
    arms: dict[str, Any] = {
        name: {**mean_series(runs), "runs": runs} for name, runs in series.items()
    }
    if "local" in results[0]:
        arms["local"]["clients"] = _mean_clients([result["local"] for result in results])
    parity = None
    if "parity" in results[0]:
        steps = [result["parity"]["first_diff_step"] for result in results]
        parity = {
            "identical": all(step is None for step in steps),
            "first_diff_step": next((step for step in steps if step is not None), None),
        }
    return {
        "arms": arms,
        "verdict": verdict(
            series,
            own=own_gain(results, facts.own_rows),
            parity=parity,
            full_bytes=2 * sampled * facts.full_bytes,
            time_split=_time_split(results),
            equal_samples=_equal_samples(results),
        ),
    }


def _codec(federation: FederationArguments, transport: TransportArguments) -> dict[str, Any]:
    """The codec of the federated arm, the only one that has one; feedback as it was in effect."""
    if transport.codec == "none":
        return {"codec": "none"}
    refactors = strategy_of(federation).properties.refactors
    feedback = CodecSettings.of(transport, refactors=refactors).feedback
    return {**asdict(transport), "error_feedback": feedback}


def _plain_series(arm: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        key: value for key, value in arm.items() if isinstance(value, list) and key not in NO_SERIES
    }


def _equal_samples(results: Sequence[SeedResult]) -> dict[str, bool]:
    """Of the arms that are read by samples, whether every seed ends within a batch."""
    return {
        name: all(result[name]["equal_samples"] for result in results)
        for name, arm in results[0].items()
        if "equal_samples" in arm
    }


def _time_split(results: Sequence[SeedResult]) -> dict[str, float]:
    """Seconds of the federated arm by activity, mean over seeds."""
    rounds = [times for result in results for times in result["federated"]["time"]]
    names = rounds[0]
    return {name: sum(times[name] for times in rounds) / len(results) for name in names}


def _mean_clients(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_client = zip(*(arm["clients"] for arm in arms), strict=True)
    return [
        {
            "client": runs[0]["client"],
            **mean_series([{k: v for k, v in run.items() if k != "client"} for run in runs]),
        }
        for runs in by_client
    ]
