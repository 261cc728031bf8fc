"""What a client answers, as Flower records: the same whether a simulation or a Trainer asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from flwr.app import RecordDict
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.adapters.fingerprint import Fingerprint
from fedtune.client.score import Score
from fedtune.errors import ManifestError
from fedtune.transport.messages import (
    ARRAYS,
    BASE,
    CONTROL,
    UNKNOWN,
    Declared,
    RoundTask,
    arrays_of,
    pack,
)
from fedtune.transport.records import config_of, to_arrays

__all__ = [
    "LocalResult",
    "Sent",
    "agree",
    "evaluated",
    "finished",
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
        params: what goes back: trained in this round, and not personal.
        num_tokens: label tokens trained on.
        train_loss: mean over the round's steps.
        control_change: c_k+ - c_k of SCAFFOLD; empty without it.
    """

    params: dict[str, Tensor]
    num_examples: int
    num_tokens: int
    num_steps: int
    train_loss: float
    train_s: float
    control_change: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """The tensors of a request.

    Attributes:
        params: the global parameters; personal ones may be absent.
        base: what has been added to the base (`adapters/base_terms.py`).
        control: the server's control variate.
    """

    params: dict[str, Tensor]
    base: dict[str, Tensor] = field(default_factory=dict)
    control: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, content: RecordDict) -> Sent:
        """From a message. Raises ManifestError."""
        return cls(*(arrays_of(content, name) for name in (ARRAYS, BASE, CONTROL)))


def manifest_of(content: RecordDict) -> Manifest:
    """The manifest of a `setup` request. Raises ManifestError, also where the server refuses."""
    if refusal := config_of(content).get("refused"):
        raise ManifestError(str(refusal))
    return Manifest.from_json(str(config_of(content).get("manifest", "")))


def round_of(content: RecordDict) -> int:
    """The round that a request speaks of."""
    return int(str(config_of(content)["round"]))


def planned(
    client: str,
    *,
    evaluates: bool,
    manifest: Manifest | None,
    declared: Declared = UNKNOWN,
    base: Fingerprint | None = None,
) -> RecordDict:
    """Who takes part, with which adapter on which base, and with how much.

    Args:
        evaluates: whether there are held-out rows.
        base: None where all clients share one.
    """
    texts = {
        "manifest": "" if manifest is None else manifest.to_json(),
        "base": "" if base is None else base.to_json(),
    }
    return pack(config={"client": client, "evaluates": evaluates, **asdict(declared), **texts})


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
        extras={CONTROL: result.control_change},
        metrics={
            "num-examples": result.num_examples,
            "num-tokens": result.num_tokens,
            "num-steps": result.num_steps,
            "train-loss": result.train_loss,
            "train-s": result.train_s,
        },
        config={"client": client, "round": task.round, "manifest": task.manifest},
    )


def evaluated(client: str, round_number: int, score: Score) -> RecordDict:
    """Scores of the global parameters, and on how many rows and label tokens; also by set."""
    sizes = {"": score.size, **{f":{prefix}": size for prefix, size in score.sets.items()}}
    counts = {f"num-examples{where}": size.examples for where, size in sizes.items()}
    counts |= {f"num-tokens{where}": size.tokens for where, size in sizes.items()}
    return pack(
        metrics={**score.metrics, **counts}, config={"client": client, "round": round_number}
    )


def finished(client: str) -> RecordDict:
    """The end of the run is known."""
    return pack(config={"client": client})


def agree(expected: Manifest, built: Manifest) -> Manifest:
    """What the client built, with that frozen which the run sends once.

    Raises:
        ManifestError: with the first difference, when a client built another adapter.
    """
    adapted = built.frozen(expected.static)
    objection = expected.objection_to(adapted)
    if objection:
        raise ManifestError(objection)
    return adapted
