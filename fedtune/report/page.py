"""`report.html`: one file that opens anywhere, with no network, script or font of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from fedtune.files import write_text
from fedtune.report import figures, result_sections, run_sections, sent_bytes
from fedtune.report.blocks import Figure
from fedtune.report.concerns import concerns
from fedtune.report.curves import PALETTE, Curve, gap_curves, loss_curves, traffic_curves
from fedtune.report.ending import last_refusals, reason
from fedtune.report.findings import finding, gaps, headline
from fedtune.report.svg import Shape, line_chart, printable
from fedtune.results.round_record import load_rounds, rounds_file
from fedtune.results.series import last
from fedtune.results.summary import Summary, load_summary

__all__ = ["both", "render", "render_report", "write_report"]


def write_report(directory: str | Path) -> Path:
    """Write `directory/report.html` from `summary.json` and `rounds.jsonl`; returns its path."""
    page = render_report(directory)
    path = Path(directory) / "report.html"
    write_text(path, page)
    return path


def render_report(directory: str | Path) -> str:
    """The page as text."""
    summary, rounds = load_summary(directory), load_rounds(directory)
    source = rounds_file(Path(directory))
    seed = source.parent.name if source and source.parent.parent.name == "seeds" else None
    return render(
        "report.html",
        directory,
        headline=headline(summary),
        **_ended(summary),
        facts=_facts(summary),
        concerns=concerns(summary),
        last_refused=run_sections.last_refused(summary),
        cards=result_sections.cards(summary),
        loss_figure=_loss_figure(summary),
        small_figures=_small_figures(summary),
        sections=(
            result_sections.verdict(summary),
            result_sections.arms(summary),
            sent_bytes.section(summary, rounds, seed),
            run_sections.rounds(summary, rounds, seed),
            run_sections.refused(rounds),
            run_sections.clients(summary),
        ),
        details=(
            ("Configuration", run_sections.details(summary.config)),
            ("Versions", run_sections.details(summary.versions)),
        ),
    )


def render(template: str, directory: str | Path, **values: Any) -> str:
    """A page from one of the templates; what is no Markup is escaped."""
    environment = Environment(
        loader=PackageLoader("fedtune.report"), autoescape=True, finalize=_finalized
    )
    environment.filters["unbroken"] = _unbroken
    name = Path(directory).resolve().name
    return environment.get_template(template).render(
        name=name, palette=PALETTE, loss=figures.loss, **values
    )


def _finalized(value: object) -> object:
    """Control characters, which no document may hold, are dropped."""
    return value if isinstance(value, Markup) else printable(value)


def _unbroken(words: str) -> str:
    """Keep `%` and `MB` on the line of their number."""
    return words.replace(" %", "\N{NO-BREAK SPACE}%").replace(" MB", "\N{NO-BREAK SPACE}MB")


def _facts(summary: Summary) -> dict[str, str | None]:
    return {
        "strategy": summary.setting("strategy"),
        "codec": summary.setting("codec"),
        "clients": summary.setting("num_clients") or str(len(summary.clients)),
        "rounds": str(summary.rounds),
        "seeds": str(summary.seeds),
        "model": summary.setting("model_name_or_path"),
    }


def _ended(summary: Summary) -> dict[str, str]:
    """Why a run did not complete, and what it found all the same."""
    if summary.status == "completed":
        return {}
    found = finding(summary) if summary.rounds else "No round was finished: there is no curve."
    tell = summary.status == "failed" and not last_refusals(summary)
    return {"found": found, "reason": reason(summary) if tell else ""}


def _loss_figure(summary: Summary) -> Figure | None:
    curves = loss_curves(summary)
    counted = last(summary.federated.mean.samples) is not None
    chart = both(
        curves,
        wide=Shape(1070, 430, right=244),
        narrow=Shape(360, 300, right=12, left=40),
        x_title="samples seen, all clients together" if counted else "round",
        y_text=figures.loss,
        title="Held-out loss against samples seen",
        start=summary.start,
    )
    return Figure("Held-out loss", _caption(summary, curves), chart, curves) if chart else None


def _caption(summary: Summary, curves: Sequence[Curve]) -> str:
    parts = ["The same held-out rows for every arm; lower is better."]
    if summary.seeds > 1:
        parts.append(f"Bands run from the lowest to the highest of {summary.seeds} seeds.")
    clients = len(summary.arms["local"].clients) if "local" in summary.arms else 0
    if clients > 1 and any(curve.tone == "local" and curve.low for curve in curves):
        parts.append(
            f"Local only: mean, best and worst of {clients} clients, each on its own rows."
        )
    return " ".join(parts)


def _small_figures(summary: Summary) -> list[Figure]:
    gap, traffic = gap_curves(summary), traffic_curves(summary)
    width = 500 if gap and traffic else 1070
    samples = next((row.samples for row in gaps(summary) if row.arm == "centralized"), "")
    gap_chart = both(
        gap,
        wide=Shape(width, 240, right=86),
        narrow=Shape(360, 230, right=76, left=40),
        x_title="round",
        y_text=lambda value: figures.percent(value, signed=True),
        title="Gap to centralized after each round",
        zero=True,
    )
    traffic_chart = both(
        traffic,
        wide=Shape(width, 240, right=178),
        narrow=Shape(360, 230, right=166, left=40),
        x_title="round",
        y_text=lambda value: figures.megabytes(value * 1e6),
        title="Cumulative MB on the wire",
        zero=True,
    )
    found = [
        Figure("Gap to centralized", f"Percent, {samples}; zero is no gap.", gap_chart),
        Figure("Traffic", "Cumulative MB on the wire, all clients.", traffic_chart),
    ]
    return [figure for figure in found if figure.chart]


def both(curves: Sequence[Curve], *, wide: Shape, narrow: Shape, **settings: Any) -> Markup:
    """A chart in two shapes, of which the page shows the one that fits; nothing without curves.

    `settings` are those of `line_chart`.
    """
    drawn = (
        line_chart(curves, shape, css=css, **settings)
        for shape, css in ((wide, "wide"), (narrow, "narrow"))
    )
    return Markup("").join(drawn)
