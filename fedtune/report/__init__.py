"""What a run shows: tables, figures, `report.html`, progress and trackers. Reads files only."""

from fedtune.report.page import render_report, write_report
from fedtune.report.plots import draw_compare, draw_loss
from fedtune.report.progress import Progress
from fedtune.report.terminal import comparison_table, traffic_table, verdict_lines
from fedtune.report.trackers import RoundTracker, open_trackers
from fedtune.results.round_record import RoundRecord, load_rounds
from fedtune.results.series import Series
from fedtune.results.summary import Arm, Summary, load_summary
from fedtune.results.verdict import Spread, Verdict

__all__ = [
    "Arm",
    "Progress",
    "RoundRecord",
    "RoundTracker",
    "Series",
    "Spread",
    "Summary",
    "Verdict",
    "comparison_table",
    "draw_compare",
    "draw_loss",
    "load_rounds",
    "load_summary",
    "open_trackers",
    "render_report",
    "traffic_table",
    "verdict_lines",
    "write_report",
]
