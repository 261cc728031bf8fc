"""`report.html`: one file that opens anywhere, with no network, script or font of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune.files import write_text
from fedtune.report import logbook, results, text, transport
from fedtune.report.concerns import concerns
from fedtune.report.curves import Curve, gap_curves, loss_curves, traffic_curves
from fedtune.report.ending import last_refusals, reason
from fedtune.report.markup import unbroken
from fedtune.report.style import style_sheet
from fedtune.report.svg import Shape, esc, line_chart
from fedtune.report.verdict import finding, gaps, headline
from fedtune.results.round_record import load_rounds, rounds_file
from fedtune.results.series import last
from fedtune.results.summary import Summary, load_summary

__all__ = ["both", "concerns_list", "page", "render_report", "write_page", "write_report"]

# Nothing may be fetched or run, whatever a name in the data says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(directory: str | Path) -> Path:
    """Write `directory/report.html` from `summary.json` and `rounds.jsonl`; returns its path."""
    return write_page(Path(directory), render_report(directory))


def write_page(directory: Path, words: str) -> Path:
    """Replace `directory/report.html`, whole."""
    path = directory / "report.html"
    write_text(path, words)
    return path


def render_report(directory: str | Path) -> str:
    """The page as text."""
    summary = load_summary(directory)
    rounds, source = load_rounds(directory), rounds_file(Path(directory))
    seed = source.parent.name if source and source.parent.parent.name == "seeds" else None
    name = esc(summary.directory.resolve().name)
    body = "".join(
        (
            _header(summary, name),
            logbook.last_refused_section(summary),
            results.cards(summary),
            _loss_figure(summary),
            _small_figures(summary),
            results.verdict_section(summary),
            results.arms_section(summary),
            transport.transport_section(summary, rounds, seed),
            logbook.rounds_section(summary, rounds, seed),
            logbook.refused_section(rounds),
            logbook.clients_section(summary),
            logbook.details("Configuration", summary.config),
            logbook.details("Versions", summary.versions),
        )
    )
    return page(name, body)


def page(name: str, body: str) -> str:
    """A whole page; `name` and `body` are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{name}: fedtune report</title>\n<style>{style_sheet()}</style>\n</head>\n"
        f"<body>\n<main>{body}<footer>Written by fedtune. MB = 10\N{SUPERSCRIPT SIX} bytes. "
        "Numbers are means over seeds unless stated.</footer></main>\n</body>\n</html>\n"
    )


def _header(summary: Summary, name: str) -> str:
    facts = {
        "strategy": summary.setting("strategy"),
        "codec": summary.setting("codec"),
        "clients": summary.setting("num_clients") or (str(len(summary.clients)) or None),
        "rounds": str(summary.rounds),
        "seeds": str(summary.seeds),
        "model": summary.setting("model_name_or_path"),
    }
    chips = "".join(
        f"<li>{label} <b>{esc(value)}</b></li>"
        for label, value in facts.items()
        if value != "0" and value
    )
    return (
        f'<header><p class="eyebrow"><b>fedtune</b> / {name}</p>'
        f"<h1>{esc(unbroken(headline(summary)))}</h1>{_ended(summary)}"
        f'<ul class="chips">{chips}</ul>{concerns_list(concerns(summary))}</header>'
    )


def _ended(summary: Summary) -> str:
    """Why a run did not complete, and what it found all the same."""
    if summary.status == "completed":
        return ""
    found = finding(summary) if summary.rounds else "No round was finished: there is no curve."
    why = "" if last_refusals(summary) else reason(summary)
    told = f'<p class="reason">{esc(why)}</p>' if summary.status == "failed" and why else ""
    return f"{told}<p>{esc(unbroken(found))}</p>"


def concerns_list(lines: Sequence[str]) -> str:
    """A box of warnings; nothing without one."""
    items = "".join(f"<li>{esc(unbroken(line))}</li>" for line in lines)
    return f'<ul class="concerns">{items}</ul>' if items else ""


def _loss_figure(summary: Summary) -> str:
    curves = loss_curves(summary)
    counted = last(summary.federated.mean.samples) is not None
    chart = both(
        curves,
        wide=Shape(1070, 430, right=244),
        narrow=Shape(360, 300, right=12, left=40),
        x_title="samples seen, all clients together" if counted else "round",
        y_text=text.loss,
        title="Held-out loss against samples seen",
        start=summary.start,
    )
    if not chart:
        return ""
    keys = "".join(
        f'<li class="t-{curve.tone}"><span class="key"></span>{esc(curve.label)} '
        f"<b>{curve.end(text.loss)}</b></li>"
        for curve in curves
    )
    return (
        f"<section><figure><h2>Held-out loss</h2><figcaption>{_caption(summary, curves)}"
        f'</figcaption><ul class="legend">{keys}</ul>{chart}</figure></section>'
    )


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


def _small_figures(summary: Summary) -> str:
    gap, traffic = gap_curves(summary), traffic_curves(summary)
    width = 500 if gap and traffic else 1070
    samples = next((row.samples for row in gaps(summary) if row.arm == "centralized"), "")
    gap_chart = both(
        gap,
        wide=Shape(width, 240, right=86),
        narrow=Shape(360, 230, right=76, left=40),
        x_title="round",
        y_text=lambda value: text.percent(value, signed=True),
        title="Gap to centralized after each round",
        zero=True,
    )
    traffic_chart = both(
        traffic,
        wide=Shape(width, 240, right=178),
        narrow=Shape(360, 230, right=166, left=40),
        x_title="round",
        y_text=lambda value: text.megabytes(value * 1e6),
        title="Cumulative MB on the wire",
        zero=True,
    )
    figures = "".join(
        f"<section><figure><h2>{title}</h2><figcaption>{note}</figcaption>{chart}</figure></section>"
        for title, note, chart in (
            ("Gap to centralized", f"Percent, {samples}; zero is no gap.", gap_chart),
            ("Traffic", "Cumulative MB on the wire, all clients.", traffic_chart),
        )
        if chart
    )
    return f'<div class="pair">{figures}</div>' if figures else ""


def both(
    curves: Sequence[Curve],
    *,
    wide: Shape,
    narrow: Shape,
    x_title: str,
    y_text: Callable[[float], str],
    title: str,
    zero: bool = False,
    start: str = "",
) -> str:
    """A chart in two shapes, of which the page shows the one that fits; nothing without curves."""

    def draw(shape: Shape, css: str) -> str:
        return line_chart(
            curves,
            shape,
            x_title=x_title,
            y_text=y_text,
            title=title,
            css=css,
            zero=zero,
            start=start,
        )

    return draw(wide, "wide") + draw(narrow, "narrow")
