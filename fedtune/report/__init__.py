"""What a run shows: tables, figures, `report.html`, progress and trackers. Reads files only."""

from fedtune.report.html import render_report, write_report
from fedtune.report.plots import draw_compare, draw_loss
from fedtune.report.progress import Progress
from fedtune.report.records import Arm, RoundRow, Series, Spread, Summary, Verdict
from fedtune.report.series import load_rounds, load_summary
from fedtune.report.table import comparison_table, traffic_table, verdict_lines
from fedtune.report.trackers import RoundTracker, open_trackers

__all__ = [
    "Arm",
    "Progress",
    "RoundRow",
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
