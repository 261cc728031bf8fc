"""Summary, picture and report of a deployed run, from the server's last durable state."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fedtune.compare.series import of_history
from fedtune.compare.summary import build_summary
from fedtune.errors import RoundError
from fedtune.files import write_json
from fedtune.report import load_summary, write_report
from fedtune.report.plots import draw_loss
from fedtune.server.checkpoint import load_latest
from fedtune.server.submission import Submission

__all__ = ["write_summary"]


def write_summary(directory: Path, submission: Submission) -> None:
    """Write `summary.json`, `loss.png` and `report.html` beside the run's other files."""
    state = load_latest(directory / "checkpoints")
    if state is None:
        raise RoundError(f"expected a server state in {directory / 'checkpoints'}, found none.")
    federated = {**of_history(state.history), "time": [row["time"] for row in state.history]}
    summary = build_summary(
        submission.federation,
        submission.transport,
        [{"federated": federated}],
        seeds=[submission.seed],
        clients=[],
        full_bytes=0,
        config={
            "federation": asdict(submission.federation),
            "transport": asdict(submission.transport),
            "run": {"run": submission.run},
        },
    )
    write_json(directory / "summary.json", summary)
    draw_loss(load_summary(directory), directory / "loss.png")
    write_report(directory)
