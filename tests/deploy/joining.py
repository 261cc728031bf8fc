"""`fedtune join` with the fake node: `python -m tests.deploy.joining [flags] -- script`."""

from __future__ import annotations

import sys
from pathlib import Path

from fedtune.cli import main as fedtune
from fedtune.deploy import join
from fedtune.relay.site import SiteFolder


def main() -> int:
    def node_command(settings: join.Settings, folder: SiteFolder) -> list[str | Path]:
        return [sys.executable, "-m", "tests.deploy.fake_node", "--site", folder.path]

    join.node_command = node_command  # type: ignore[assignment]
    status = fedtune(["join", *sys.argv[1:]])
    assert "torch" not in sys.modules
    return status


if __name__ == "__main__":
    sys.exit(main())
