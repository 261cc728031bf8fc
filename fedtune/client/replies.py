"""What a client answers, as Flower records: the same whether a simulation or a Trainer asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import RecordDict
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.errors import ManifestError
from fedtune.transport.messages import RoundTask, pack
from fedtune.transport.records import config_of, params_of, to_arrays

__all__ = [
    "LocalResult",
    "agree",
    "evaluated",
    "finished",
    "global_of",
    "initial",
    "manifest_of",
    "planned",
    "round_of",
    "set_up",
    "trained",
]


@dataclass(frozen=True)
class LocalResult:
    """What a client's part of a round has come to.

    Attributes:
        num_tokens: label tokens trained on.
        train_loss: mean over the round's steps.
    """

    params: dict[str, Tensor]
    num_examples: int
    num_tokens: int
    num_steps: int
    train_loss: float
    train_s: float


def global_of(content: RecordDict) -> dict[str, Tensor]:
    """The parameters of a request; empty when it carries none. Raises ManifestError."""
    arrays = content.array_records.get("arrays")
    return params_of(arrays) if arrays else {}


def manifest_of(content: RecordDict) -> Manifest:
    """The manifest of a `setup` request. Raises ManifestError."""
    return Manifest.from_json(str(config_of(content).get("manifest", "")))


def round_of(content: RecordDict) -> int:
    """The round that a request speaks of."""
    return int(str(config_of(content)["round"]))


def planned(client: str, *, evaluates: bool, manifest: Manifest | None, rows: int) -> RecordDict:
    """Who takes part: `rows` train rows (0 when unknown), and whether there are held-out ones."""
    text = "" if manifest is None else manifest.to_json()
    return pack(config={"client": client, "evaluates": evaluates, "manifest": text, "rows": rows})


def initial(
    params: Mapping[str, Tensor], static: Mapping[str, Tensor], manifest: Manifest
) -> RecordDict:
    """Parameters as built, static tensors where there are any."""
    content = pack(arrays=params, config={"manifest": manifest.to_json()})
    if static:
        content["static"] = to_arrays(static)
    return content


def set_up(client: str) -> RecordDict:
    """Manifest and static tensors are in place."""
    return pack(config={"client": client})


def trained(client: str, task: RoundTask, result: LocalResult) -> RecordDict:
    """The update of a round."""
    return pack(
        arrays=result.params,
        metrics={
            "num-examples": result.num_examples,
            "num-tokens": result.num_tokens,
            "num-steps": result.num_steps,
            "train-loss": result.train_loss,
            "train-s": result.train_s,
        },
        config={"client": client, "round": task.round, "manifest": task.manifest},
    )


def evaluated(
    client: str,
    round_number: int,
    metrics: Mapping[str, float],
    *,
    num_examples: int,
    num_tokens: int,
) -> RecordDict:
    """Scores of the global parameters, and on how many rows and label tokens."""
    return pack(
        metrics={**metrics, "num-examples": num_examples, "num-tokens": num_tokens},
        config={"client": client, "round": round_number},
    )


def finished(client: str) -> RecordDict:
    """The end of the run is known."""
    return pack(config={"client": client})


def agree(expected: Manifest, built: Manifest) -> None:
    """Raises ManifestError, with the first difference, when a client built another adapter."""
    objection = expected.objection_to(built)
    if objection:
        raise ManifestError(objection)
