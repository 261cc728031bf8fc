"""The summary of a run: all arms, the verdict, the data, the settings and the versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedtune.compare.facts import Facts
from fedtune.compare.gaps import own_gain, verdict
from fedtune.config import FederationArguments, TransportArguments, sampled_clients
from fedtune.results.series import Series
from fedtune.results.summary import Arm, Summary
from fedtune.results.verdict import Parity
from fedtune.strategies import strategy_of
from fedtune.transport.settings import CodecSettings

__all__ = ["SeedResult", "build_summary"]

# One seed's arms: name -> its part of the summary ("federated" is always there).
SeedResult = Mapping[str, Mapping[str, Any]]


def build_summary(facts: Facts, results: Sequence[SeedResult], **ended: Any) -> Summary:
    """The summary over those seeds that have `results`; series are means, `runs` one per seed.

    `ended`: how the run ended, by the fields of Summary.
    """
    federation = facts.federation
    return Summary(
        run_with={
            "strategy": federation.strategy,
            "engine": federation.engine,
            **_codec(federation, facts.transport),
        },
        asked_seeds=facts.seeds,
        base_loss=facts.base_loss,
        **(_measured(facts, results) if results else {}),
        **facts.given,
        **ended,
    )


def _measured(facts: Facts, results: Sequence[SeedResult]) -> dict[str, Any]:
    sampled = sampled_clients(facts.federation.fraction_train, len(facts.clients))
    runs = {
        name: tuple(Series.from_json(result[name]) for result in results)
        for name in results[0]
        if name != "parity"
    }
    clients = {"local": _mean_clients(results)} if "local" in results[0] else {}
    return {
        "arms": {
            name: Arm(Series.mean(series), series, clients.get(name, {}))
            for name, series in runs.items()
        },
        "verdict": verdict(
            runs,
            own=own_gain(results, facts.own_rows),
            parity=_parity(results),
            full_bytes=2 * sampled * facts.full_bytes,
            time_split=_time_split(results),
            equal_samples=_equal_samples(results),
        ),
    }


def _parity(results: Sequence[SeedResult]) -> Parity | None:
    if "parity" not in results[0]:
        return None
    steps = [result["parity"]["first_diff_step"] for result in results]
    first = next((step for step in steps if step is not None), None)
    return Parity(first is None, first)


def _codec(federation: FederationArguments, transport: TransportArguments) -> dict[str, Any]:
    """The codec of the federated arm, the only one that has one; feedback as it was in effect."""
    if transport.codec == "none":
        return {"codec": "none"}
    refactors = strategy_of(federation).properties.refactors
    feedback = CodecSettings.of(transport, refactors=refactors).feedback
    return {**asdict(transport), "error_feedback": feedback}


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


def _mean_clients(results: Sequence[SeedResult]) -> dict[str, Series]:
    """Each client's own training, mean over seeds."""
    by_client = zip(*(result["local"]["clients"] for result in results), strict=True)
    return {
        runs[0]["client"]: Series.mean([Series.from_json(run) for run in runs])
        for runs in by_client
    }
