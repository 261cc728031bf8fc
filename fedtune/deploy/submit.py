"""`fedtune submit`: start a run at a SuperLink on this host, follow it, end with its status."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import secrets
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedtune.config import (
    AdapterArguments,
    Arguments,
    DataArguments,
    FederationArguments,
    ModelArguments,
    RunArguments,
    TransportArguments,
)
from fedtune.deploy.address import Address
from fedtune.deploy.bundle import APP
from fedtune.deploy.connection import Connection
from fedtune.deploy.follow import follow
from fedtune.deploy.submitted_runs import check_register, remember_run
from fedtune.deploy.superlink_runs import list_runs
from fedtune.deploy.waiting import START_S, NotStarted
from fedtune.errors import ConfigError, DeployError, RoundError
from fedtune.files import read_object
from fedtune.lists import split_names
from fedtune.lock import hold, holder
from fedtune.output_dir import check_output_dir, prepare_output_dir
from fedtune.processes.last_line import say_last
from fedtune.processes.signals import Stopped, held, status_of
from fedtune.server.submission import SUBMISSION, Submission

__all__ = ["add_arguments", "facts_of", "run", "run_problem", "start_run"]

END_S = 10.0  # from the server's last word to its end

# Settings of a federation that a simulation alone has, or that each site chooses for itself.
NOT_HERE = ("engine", "num_clients", "client_state", "cpus_per_client", "gpus_per_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune submit`."""
    parser.add_argument("--superlink", default="127.0.0.1:8000", metavar="HOST:PORT")
    parser.add_argument(
        "--tls", type=Path, metavar="DIR", help="the submit folder that fedtune certs made"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/federation"))
    parser.add_argument(
        "--min_clients", type=int, default=2, help="sites that must have joined before round 1 (2)"
    )
    parser.add_argument(
        "--join_timeout_s", type=float, default=600.0, help="how long to wait for them (600)"
    )
    parser.add_argument(
        "--start_timeout_s",
        type=float,
        default=START_S,
        metavar="S",
        help=f"how long the run's own process may take to start ({START_S:g})",
    )
    for group in (FederationArguments, TransportArguments):
        hints = get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name not in NOT_HERE:
                shown = "" if field.default is None else f" ({field.default})"
                parser.add_argument(
                    f"--{field.name}",
                    default=field.default,
                    help=f"{field.metadata['help']}{shown}",
                    **_value_of(field.name, hints[field.name]),
                )
    parser.add_argument("--seed", type=int, default=42, help="of sampling and of the sites (42)")
    parser.add_argument(
        "--init_adapter", metavar="DIR", help="first global adapter; default: one site's"
    )
    parser.add_argument("--track", help="server scalars to: tensorboard, mlflow, wandb")
    parser.add_argument(
        "--resume", action="store_true", help="go on after the last durable round in --output_dir"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run there")


def run(args: argparse.Namespace) -> int:
    """`fedtune submit`: status 0 when the run is done, 1 when it failed."""
    federation, transport = _checked(args)
    address = Address.parse(args.superlink)
    output: dict[str, Any] = {
        "directory": args.output_dir,
        "resume": args.resume,
        "overwrite": args.overwrite,
        "settings": _settings(args, federation, transport),
    }
    check_output_dir(**output)
    with Connection(address, tls=args.tls) as link:
        link.probe()
        _check_idle(link, args.output_dir.absolute())
        directory = args.output_dir.absolute()
        submission = Submission(
            run=_run_id(directory, args.resume),
            directory=str(directory),
            federation=federation,
            seed=args.seed,
            min_clients=args.min_clients,
            join_timeout_s=args.join_timeout_s,
            init_adapter=args.init_adapter and str(Path(args.init_adapter).absolute()),
            transport=transport,
            track=tuple(split_names(args.track)),
            resume=args.resume,
        )
        started = time.time()
        check_register()
        run_id = ""
        try:
            with hold(directory):
                prepare_output_dir(**output, facts=facts_of(submission))
                with held():  # whether it has begun is known before anything ends this
                    run_id = start_run(link, submission)
            print(
                f"run {run_id} ({submission.run} at the sites): {federation.num_rounds} rounds "
                f"into {args.output_dir}",
                flush=True,
            )
            follow(
                directory,
                federation.num_rounds,
                lambda: run_problem(link, run_id),
                since=started,
                start_timeout_s=args.start_timeout_s,
                left=lambda: holder(directory) is None,  # the server holds it to its end
            )
        except RoundError as error:
            if isinstance(error, NotStarted):
                with contextlib.suppress(DeployError):  # why it is given up is the news
                    link.flwr("stop", run_id)
            _report(directory)
            say_last(f"error: {error}", sys.stderr)
            return 1
        except (KeyboardInterrupt, Stopped) as stop:
            say_last(_left(run_id, address), sys.stderr)
            return status_of(stop)
    _report(directory)
    return 0


def _left(run_id: str, address: Address) -> str:
    if not run_id:
        return "interrupted before the run began; nothing goes on"
    where = f"--superlink {address}"
    return f"left; the run goes on. fedtune status {where}, fedtune stop {where}"


def start_run(link: Connection, submission: Submission) -> str:
    """Hand the submission to the SuperLink; returns Flower's id of the run."""
    settings = submission.write()
    reply = link.flwr("run", APP, "--run-config", f'settings="{settings}"')
    run_id = str(reply["run-id"])
    remember_run(run_id, Path(submission.directory))
    return run_id


def run_problem(link: Connection, run_id: str) -> str | None:
    """Why Flower does not run it any more, or None."""
    try:
        runs = link.flwr("list", "--run-id", run_id)["runs"]
    except DeployError as error:
        return str(error)
    if not runs:
        return "unknown run"
    status = str(runs[0]["status"])
    if status.split(":")[0] in ("pending", "starting", "running"):
        return None
    details = str(runs[0].get("status-details") or "")
    return status if details in ("", "N/A") else details


def _checked(args: argparse.Namespace) -> tuple[FederationArguments, TransportArguments]:
    """What the flags ask for; raises ConfigError for the first setting that cannot work."""
    from fedtune.checks import check_federation

    if args.min_clients < 1:
        raise ConfigError(f"--min_clients: expected at least 1, received {args.min_clients}.")
    for flag in ("join_timeout_s", "start_timeout_s"):
        if not 0 < getattr(args, flag) < math.inf:
            raise ConfigError(f"--{flag}: expected seconds > 0, received {getattr(args, flag)}.")
    _check_adapter(args.init_adapter)
    federation = FederationArguments(
        num_clients=args.min_clients, **_given(args, FederationArguments)
    )
    transport = TransportArguments(**_given(args, TransportArguments))
    check_federation(
        Arguments(
            ModelArguments(),
            AdapterArguments(init_adapter=args.init_adapter),
            DataArguments(),
            federation,
            transport,
            RunArguments(resume=args.resume, overwrite=args.overwrite, track=args.track),
            SimpleNamespace(seed=args.seed, output_dir=str(args.output_dir)),
        )
    )
    return federation, transport


def _given(args: argparse.Namespace, group: type[Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(group)} - set(NOT_HERE)
    return {name: getattr(args, name) for name in names}


def _check_idle(link: Connection, directory: Path) -> None:
    """Two servers in one directory would train and write every round twice."""
    for other in list_runs(link):
        if other.is_active and other.output_dir == directory:
            raise ConfigError(
                f"--output_dir: run {other.id} is still going on there. See fedtune status; "
                "fedtune stop ends it."
            )


def _check_adapter(directory: str | None) -> None:
    """Whether it looks like an adapter; the server reads it when the sites have told theirs."""
    signs = ("fedtune_manifest.json", "adapter_config.json")
    if directory and not any((Path(directory) / name).is_file() for name in signs):
        raise ConfigError(
            f"--init_adapter: expected a directory with {' or '.join(signs)}, received "
            f"{directory}. Give the adapter/ of a run, or a PEFT checkpoint."
        )


def _settings(
    args: argparse.Namespace, federation: FederationArguments, transport: TransportArguments
) -> dict[str, Any]:
    """What a resumed run must share with the run it continues."""
    free = ("max_failed_rounds", "min_replies", "round_timeout_s", "save_every_rounds", *NOT_HERE)
    shared = {k: v for k, v in vars(federation).items() if k not in free}
    return {**shared, **vars(transport), "seed": args.seed}


def _run_id(directory: Path, resume: bool) -> str:
    """Sites know a continued run by the id that it began with."""
    if resume and (directory / SUBMISSION).is_file():
        fix = "Start a new run with --overwrite."
        found = read_object(directory / SUBMISSION, fix).get("run")
        if not isinstance(found, str):
            raise ConfigError(f"{directory / SUBMISSION}: expected the id of a run. {fix}")
        return found
    return secrets.token_hex(6)


def _value_of(name: str, hint: Any) -> dict[str, Any]:
    """How a flag takes its value: `int | None` and the like, one of a Literal, `[true|false]`."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    kind = next(iter(get_args(hint)), hint)
    if kind is bool:
        return {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": kind, "metavar": name.rpartition("_")[2].upper()}


def _truth(text: str) -> bool:
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, received {text!r}")
    return words[text.lower()]


def facts_of(submission: Submission) -> dict[str, Any]:
    """What the run's `run.json` says of it; rows and model are at the sites."""
    from fedtune.compare.facts import Facts

    config = {
        "federation": dataclasses.asdict(submission.federation),
        "transport": dataclasses.asdict(submission.transport),
        "run": {"run": submission.run},
    }
    return Facts(config=config, seeds=[submission.seed]).to_json()


def _report(directory: Path) -> None:
    from fedtune.compare.settle import settle, way_on

    deadline = time.monotonic() + END_S
    while holder(directory) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    settle(directory)
    well, lines = way_on(directory)
    print("\n".join(lines), file=sys.stdout if well else sys.stderr, flush=True)
