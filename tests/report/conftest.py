from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.made_up import made_up_rounds, made_up_summary, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    summary = made_up_summary()
    return write_run(tmp_path / "demo-run", summary, made_up_rounds(summary))
