"""What a run starts from: silos, a worker with every client's Trainer, and the table of clients."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedtune.adapters import Manifest, load_init_adapter
from fedtune.adapters.size import exchanged_bytes, resident_bytes
from fedtune.client.loader import check_loader, check_rounds
from fedtune.client.local import steps_of
from fedtune.client.worker import BuildModel, BuildTrainer, Worker
from fedtune.config import Arguments
from fedtune.data import client_table, find_label_column, make_silos
from fedtune.data.silos import Silos
from fedtune.data.usage import Usage
from fedtune.errors import ConfigError, FedtuneError
from fedtune.run.identity import identity_of
from fedtune.transport.settings import CodecSettings

__all__ = ["Prepared", "load_silos", "prepare", "steps_per_client", "with_seed"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A worker and its clients' data in numbers.

    Attributes:
        model_bytes: what the model takes in memory.
        full_bytes: what exchanging the whole base model once would take.
        identity: rows, base model and tokenizer by content, and what became of the rows.
        held_out: what the held-out rows are scored on.
        notes: what the rows make worth a warning.
    """

    worker: Worker
    clients: list[dict[str, Any]]
    model_bytes: int
    full_bytes: int
    identity: dict[str, dict[str, Any]]
    held_out: Usage
    notes: list[str]

    def warn(self) -> None:
        """Log the notes."""
        for note in self.notes:
            log.warning("%s", note)


def load_silos(args: Arguments) -> Silos:
    """Rows of every client and the held-out rows; they depend on `--data_seed`, not on the seed."""
    training = args.training
    one_batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return make_silos(
        args.data,
        num_clients=args.federation.num_clients,
        min_rows=args.data.min_rows or one_batch,
        data_seed=training.data_seed,
    )


def prepare(
    args: Arguments,
    seed: int,
    silos: Silos,
    work_dir: Path,
    build_model: BuildModel,
    build_trainer: BuildTrainer,
) -> Prepared:
    """Build the model and every client's Trainer: what cannot work is known before training."""
    worker = Worker(
        build_model,
        build_trainer,
        _at_highest_rank(with_seed(args, seed)),
        dict(zip(silos.names, silos.train, strict=True)),
        silos.evaluation,
        work_dir,
    )
    for name in silos.names:
        check_loader(worker.trainer(name), name)
        if args.federation.engine != "flower":  # whose trainers never stop
            check_rounds(worker.trainer(name), name, carry=args.federation.client_state == "carry")
    usages = [worker.usage(name) for name in silos.names]
    held_out = worker.held_out_usage()
    # Only now, as a Trainer may cast the adapter.
    CodecSettings.of(args.transport, refactors=False).check_use(worker.manifest.entries)
    if args.adapter.init_adapter:
        _check_init_adapter(args.adapter.init_adapter, worker.manifest)
    label = find_label_column(silos.train[0].column_names, args.data)
    notes = _notes(silos, usages, held_out)
    identity = identity_of(silos.train, silos.evaluation, worker.model, worker.tokenizer)
    identity["data"] |= {
        "evaluation": held_out.as_json(),
        "duplicates": asdict(silos.duplicates),
        "notes": notes,
    }
    return Prepared(
        worker,
        client_table(silos, usages, label),
        model_bytes=resident_bytes(worker.model),
        full_bytes=exchanged_bytes(worker.model),
        identity=identity,
        held_out=held_out,
        notes=notes,
    )


def steps_per_client(args: Arguments, worker: Worker) -> list[int]:
    """Optimizer steps of each client in a round."""
    return [steps_of(worker.trainer(name), *args.federation.budget) for name in worker.train]


def with_seed(args: Arguments, seed: int) -> Arguments:
    """The same settings with `seed` for model and data order."""
    seeded = copy.copy(args)
    seeded.training = copy.deepcopy(args.training)
    seeded.training.seed = seeded.training.data_seed = seed
    return seeded


def _at_highest_rank(args: Arguments) -> Arguments:
    """The clients of one process share one live adapter; lower ranks live in it padded."""
    ranks = args.adapter.ranks
    if ranks is not None:
        args.adapter = args.adapter.at_rank(max(ranks))
    return args


def _check_init_adapter(directory: str, manifest: Manifest) -> None:
    try:
        load_init_adapter(directory, manifest)
    except FedtuneError as error:
        raise ConfigError(f"--init_adapter: {error}") from None


def _notes(silos: Silos, usages: list[Usage], held_out: Usage) -> list[str]:
    """What the rows make worth a warning."""
    notes = silos.duplicates.sentences()
    every = [usage for usage in usages if usage.given.every_turn]
    if every:
        tokens = sum(usage.tokens or 0 for usage in every)
        share = 100 * sum(usage.label_tokens or 0 for usage in every) / max(1, tokens)
        notes.append(
            "conversations: the chat template marks no assistant turns ({% generation %}), so the "
            f"loss is on all turns, system and user too: {share:.0f} % of the tokens are label "
            "tokens. Mark them in the template to train on answers only"
        )
    for name, usage in zip(silos.names, usages, strict=True):
        notes += usage.sentences(f"training rows of {name}")
    return notes + held_out.sentences("held-out rows")
