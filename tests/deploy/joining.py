"""`fedtune join` with the fake node: `python -m tests.deploy.joining [flags] -- script`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedtune.deploy import site
from fedtune.errors import FedtuneError
from fedtune.relay.site import SiteFolder


def main() -> int:
    def node_command(settings: site.Settings, folder: SiteFolder) -> list[str | Path]:
        return [sys.executable, "-m", "tests.deploy.fake_node", "--site", folder.path]

    site.node_command = node_command  # type: ignore[assignment]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    site.add_arguments(parser)
    try:
        status = site.run(parser.parse_args())
    except FedtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    assert "torch" not in sys.modules
    return status


if __name__ == "__main__":
    sys.exit(main())
