"""Server and sites are started at the same time, as by the same service manager."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.deployment.parts import Deployment


@pytest.mark.slow
def test_a_site_that_starts_with_the_server_is_let_in_without_being_refused() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="together-") as directory,
        tempfile.TemporaryDirectory(prefix="ft-") as temporary,
    ):
        made = Deployment(Path(directory), Path(temporary), tls=True)
        try:
            sites = [made.join(name, "--step_s", 0) for name in "ab"]
            made.up()
            for site in sites:
                site.sees("waiting for a run")
                assert "not accepted" not in site.printed
        finally:
            assert made.close() == []
