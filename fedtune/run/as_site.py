"""A recipe that `fedtune join` started: the Trainer of one silo, patched, and one train()."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedtune.client.patch import patch
from fedtune.client.worker import BuildModel, BuildTrainer, Worker
from fedtune.config import Arguments
from fedtune.errors import ConfigError
from fedtune.relay.folder import RunFolder, SitePlan
from fedtune.run.prepare import load_silos, with_seed

__all__ = ["take_part"]


def take_part(
    args: Arguments, folder: RunFolder, build_model: BuildModel, build_trainer: BuildTrainer
) -> None:
    """Train the silo that this site is named after, for a whole run."""
    plan = folder.plan
    assert plan is not None, "join starts the script when the plan is there"
    silos = load_silos(args)
    train = dict(zip(silos.names, silos.train, strict=True))
    _check_name(plan, list(train))
    worker = Worker(
        build_model,
        build_trainer,
        _at_own_rank(with_seed(args, plan.seed), list(train).index(plan.client)),
        {plan.client: train[plan.client]},
        silos.evaluation,
        Path(folder.path) / "work",
    )
    patch(worker.trainer(plan.client)).train()


def _at_own_rank(args: Arguments, index: int) -> Arguments:
    """The settings with the rank that `--client_ranks` gives this client."""
    ranks = args.adapter.ranks
    if ranks is not None:
        args.adapter = replace(args.adapter.at_rank(ranks[index]), client_ranks=None)
    return args


def _check_name(plan: SitePlan, names: list[str]) -> None:
    if plan.client not in names:
        raise ConfigError(
            f"--name: expected one of {', '.join(names)}, the silos that this recipe deals out, "
            f"received {plan.client}. Give each site its own rows in a script of its own, or use "
            "these names."
        )
