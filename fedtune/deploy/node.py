"""The node of a site: Flower's SuperNode, quick, running only the relay of this fedtune.

    python -m fedtune.deploy.node --superlink HOST:PORT --site DIR
        (--root_certificates FILE [--private_key FILE] | --insecure)

Loads no torch. Code that the server sends is compared with fedtune's own app and never run.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from fedtune._flower.app_bundle import hash_app
from fedtune._flower.run_watch import RunWatch
from fedtune._flower.supernode import NodeOptions, run_supernode, run_untested_supernode
from fedtune._flower.version import TESTED, flower_version, is_tested
from fedtune.deploy.bundle import APP, app_hash
from fedtune.errors import ConfigError, FedtuneError, SiteError
from fedtune.processes.parent import die_with_parent
from fedtune.relay.folder import Over, RunFolder
from fedtune.relay.site import ENVIRONMENT, SiteFolder

__all__ = ["add_arguments", "main", "run_node"]

RELAY = "fedtune.relay.app:app"
# Nothing calls out; a relay computes nothing that threads would speed up.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a node."""
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--site", required=True, type=Path, metavar="DIR", help="private directory")
    parser.add_argument(
        "--root_certificates", type=Path, metavar="FILE", help="CA of the SuperLink"
    )
    parser.add_argument("--private_key", type=Path, metavar="FILE", help="this node's key")
    parser.add_argument("--insecure", action="store_true", help="no TLS")
    parser.add_argument(
        "--runtime_port", type=int, default=0, metavar="PORT", help="on loopback; default: any free"
    )
    parser.add_argument(
        "--allow_untested_flwr",
        action="store_true",
        help="with an untested Flower: run its own SuperNode, and the code that the server sends",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a node until it is stopped; status 2 for a wrong setting, after one line."""
    parser = argparse.ArgumentParser(prog="python -m fedtune.deploy.node", allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[_our_handler()]
    )
    try:
        options = _options(args)
        run_node(options, allow_untested=args.allow_untested_flwr)
    except FedtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_node(
    options: NodeOptions,
    *,
    app: Path = APP,
    client: str = RELAY,
    allow_untested: bool = False,
    flower: str | None = None,
) -> NoReturn:
    """Become the node; ends the process.

    Args:
        app: directory of the app that is accepted.
        client: `module:attribute` of the ClientApp that runs in its place.
        allow_untested: with an untested Flower, fall back to its own SuperNode.
        flower: version of Flower; default: the installed one.

    Raises:
        ConfigError: the Flower is untested and may not be used.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ[ENVIRONMENT] = str(options.folder)
    flower = flower or flower_version()
    if not is_tested(flower):
        if not allow_untested:
            raise ConfigError(
                f"flwr: expected {' or '.join(TESTED)}, received {flower}, with which the app that "
                "a server sends cannot be checked. Install flwr~="
                f"{TESTED[-1]}.0, or give --allow_untested_flwr to run what the server sends."
            )
        log.warning(
            "flwr %s is untested: messages take seconds longer, and code that the server sends is "
            "run unchecked (--allow_untested_flwr).",
            flower,
        )
        run_untested_supernode(options)
    run_supernode(
        options,
        check=_checker(app_hash(app)),
        load=_loader(client),
        bind=die_with_parent,
        watch=_watch(SiteFolder(options.folder)),
    )


def _our_handler() -> logging.Handler:
    """Without what Flower logs, which its own handler prints already."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.name.partition(".")[0] != "flwr")
    return handler


def _options(args: argparse.Namespace) -> NodeOptions:
    if args.insecure == (args.root_certificates is not None):
        raise ConfigError(
            "node: expected either --root_certificates or --insecure. Give the file ca.crt of the "
            "server, or --insecure for a test on one machine."
        )
    if args.private_key is not None and args.insecure:
        raise ConfigError("--private_key: needs TLS. Give --root_certificates too.")
    for flag in ("root_certificates", "private_key"):
        file = getattr(args, flag)
        if file is not None and not file.is_file():
            raise ConfigError(f"--{flag}: there is no file {file}. Copy it from the server.")
    if not args.site.is_dir():
        raise ConfigError(f"--site: there is no directory {args.site}. Use fedtune join.")
    return NodeOptions(
        superlink=args.superlink,
        root_certificates=args.root_certificates,
        private_key=args.private_key,
        folder=args.site.resolve(),
        port=args.runtime_port,
    )


def _watch(site: SiteFolder) -> RunWatch:
    """Notes which runs are over; a script that has trained is kept, should its run be continued."""

    def open_runs() -> dict[str, RunFolder]:
        return {
            folder.flower_run: folder
            for folder in site.planned()
            if not folder.is_over and folder.over is None
        }

    def over(run: str, reason: str) -> None:
        folder = open_runs().get(run)
        if folder is not None:
            folder.write_over(Over(run, reason, at_once=folder.progress.round == 0))

    return RunWatch(open_runs, over)


def _checker(expected: str) -> Callable[[bytes], None]:
    def check(bundle: bytes) -> None:
        received = hash_app(bundle)
        if received != expected:
            raise SiteError(
                f"app: expected {expected} (fedtune {version('fedtune')} at this site), received "
                f"{received}. Install the same fedtune version on both sides."
            )

    return check


def _loader(reference: str) -> Callable[[], Any]:
    def load() -> Any:
        module, _, attribute = reference.partition(":")
        return getattr(import_module(module), attribute)

    return load


if __name__ == "__main__":
    sys.exit(main())
