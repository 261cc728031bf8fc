"""Which lines a chart has, and in which colours; matplotlib and the SVG draw the same ones.

Colours are Okabe and Ito's, which stay apart under the common kinds of colour blindness; the dark
variants are lighter. No line is told apart by colour alone: each has its name at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtune.report import figures
from fedtune.results.series import Series, Values, last
from fedtune.results.summary import Summary

__all__ = [
    "ARM_LABELS",
    "COMPARE_TONES",
    "PALETTE",
    "Curve",
    "compare_curves",
    "gap_curves",
    "loss_curves",
    "run_names",
    "traffic_curves",
]

PALETTE = {  # tone: (on white, on dark)
    "federated": ("#0072b2", "#58aee8"),
    "centralized": ("#d55e00", "#f0884a"),
    "centralized_large_batch": ("#b98200", "#e3b341"),
    "local": ("#009e73", "#3fc79a"),
    "fixed_global": ("#7b8490", "#8d97a3"),
    "violet": ("#a3508a", "#da9bc6"),
    "base": ("#3b424a", "#c6cdd4"),
}
COMPARE_TONES = (
    "federated",
    "centralized",
    "local",
    "violet",
    "centralized_large_batch",
    "fixed_global",
)

ARM_LABELS = {
    "federated": "federated",
    "centralized": "centralized",
    "centralized_large_batch": "centralized, large batch",
    "local": "local only",
    "fixed_global": "fixed global (control)",
}


LONGEST = 26  # characters of a directory in a label


@dataclass(frozen=True)
class Curve:
    """One line: y over x, with a band from low to high where there is a spread."""

    tone: str
    label: str
    x: Values
    y: Values
    low: Values = ()
    high: Values = ()
    dashed: bool = False

    def end(self, y_text: Callable[[float], str]) -> str:
        """The last value in words; a training whose loss is no number any more says so."""
        value = self.y[-1]
        return "diverged" if value is None else y_text(value)


def loss_curves(summary: Summary) -> list[Curve]:
    """Eval loss against samples seen by all clients together, one curve per arm; the base model.

    Local models and the control are drawn at the round they belong to, which is the federated x.
    """
    shared = _samples(summary.federated.mean)
    curves: list[Curve] = []
    if not summary.rounds:  # a point is no curve
        return curves
    for name, label in ARM_LABELS.items():
        arm = summary.arms.get(name)
        if arm is None or last(arm.mean.eval_loss) is None:
            continue
        own = _samples(arm.mean)
        by_round = name in ("local", "fixed_global") and len(own) == len(shared)
        low, high = _extremes([one.eval_loss for one in arm.members(name)])
        curves.append(
            Curve(
                tone=name,
                label=label,
                x=shared if by_round else own,
                y=arm.mean.eval_loss,
                low=low,
                high=high,
                dashed=name == "fixed_global",
            )
        )
    return [*curves, *_base_curve(summary, curves)]


def _base_curve(summary: Summary, curves: Sequence[Curve]) -> list[Curve]:
    """The base model's own loss, over the width of the others."""
    base, xs = summary.base_loss, [x for curve in curves for x in curve.x if x is not None]
    if base is None or not xs:
        return []
    return [Curve("base", "base model", (min(xs), max(xs)), (base, base), dashed=True)]


def gap_curves(summary: Summary) -> list[Curve]:
    """Gap to centralized in % after each round, band over seeds; empty without that arm."""
    central = summary.arms.get("centralized")
    if central is None:
        return []
    mean = _gap(summary.federated.mean, central.mean)
    if last(mean[1:]) is None:
        return []
    runs = zip(summary.federated.runs, central.runs, strict=False)
    low, high = _extremes([_gap(federated, other) for federated, other in runs])
    return [Curve("federated", "", _rounds(mean), mean, low, high)]


def traffic_curves(summary: Summary) -> list[Curve]:
    """Cumulative MB on the wire, and what the same records would be without a codec (dashed)."""
    series = summary.federated.mean
    curves: list[Curve] = []
    if not summary.rounds:
        return curves
    for tone, label, wire, raw in (
        ("federated", "up", series.bytes_up, series.bytes_up_raw),
        ("violet", "down", series.bytes_down, series.bytes_down_raw),
    ):
        sent, plain = _cumulative_mb(wire), _cumulative_mb(raw)
        if not last(sent):
            continue
        curves.append(Curve(tone, label, _rounds(sent), sent))
        if (last(plain) or 0) > 1.05 * (last(sent) or 0):
            name = f"{label}, no codec"
            curves.append(Curve(tone, name, _rounds(plain), plain, dashed=True))
    return curves


def compare_curves(summaries: Sequence[Summary]) -> list[Curve]:
    """One federated curve per run."""
    labels = _compare_labels(summaries)
    curves = []
    for index, (summary, label) in enumerate(zip(summaries, labels, strict=True)):
        arm = summary.federated
        low, high = _extremes([run.eval_loss for run in arm.runs])
        tone = COMPARE_TONES[index % len(COMPARE_TONES)]
        dashed = index >= len(COMPARE_TONES)
        x = _samples(arm.mean)
        curves.append(Curve(tone, label, x, arm.mean.eval_loss, low, high, dashed))
    return curves


def _compare_labels(summaries: Sequence[Summary]) -> list[str]:
    """`directory (strategy, codec, 2 rounds)`: only what differs and is not the directory's name.

    So that nobody reads a longer training as a better method.
    """
    facts = [
        (
            summary.setting("strategy"),
            summary.setting("codec"),
            f"{summary.rounds} round{'' if summary.rounds == 1 else 's'}",
            _seen(summary),
            summary.status,
        )
        for summary in summaries
    ]
    told = [len(set(column)) > 1 for column in zip(*facts, strict=True)]
    labels = []
    for name, fact in zip(run_names(summaries), facts, strict=True):
        known = ", ".join(
            value
            for value, differs in zip(fact, told, strict=True)
            if differs and value not in (None, name, "completed")
        )
        labels.append(f"{name} ({known})" if known else name)
    return labels


def _seen(summary: Summary) -> str | None:
    samples = last(summary.federated.mean.samples)
    return None if samples is None else f"{figures.compact(samples)} samples"


def run_names(summaries: Sequence[Summary]) -> list[str]:
    """Directories, with their parents where two share a name; long ones lose their middle."""
    paths = [summary.directory.resolve() for summary in summaries]
    names = []
    for path in paths:
        twin = sum(other.name == path.name for other in paths) > 1
        name = f"{path.parent.name}/{path.name}" if twin else path.name
        names.append(name if len(name) <= LONGEST else f"{name[:11]}...{name[14 - LONGEST :]}")
    return names


def _samples(series: Series) -> Values:
    """Samples seen, or round numbers where a run did not count them."""
    if len(series.samples) == len(series.eval_loss) and last(series.samples):
        return series.samples
    return _rounds(series.eval_loss)


def _rounds(values: Values) -> Values:
    return tuple(float(index) for index in range(len(values)))


def _extremes(series: Sequence[Values]) -> tuple[Values, Values]:
    """Lowest and highest by index; nothing for fewer than two series."""
    if len(series) < 2:
        return (), ()
    columns = list(zip(*series, strict=False))
    return _each(min, columns), _each(max, columns)


def _each(pick: Callable[[list[float]], float], columns: Sequence[Values]) -> Values:
    known = [[value for value in column if value is not None] for column in columns]
    return tuple(pick(values) if values else None for values in known)


def _gap(federated: Series, other: Series) -> Values:
    pairs = zip(federated.eval_loss, other.eval_loss, strict=False)
    return tuple(100 * (f - c) / c if f is not None and c else None for f, c in pairs)


def _cumulative_mb(values: Values) -> Values:
    total = 0.0
    sums = []
    for value in values:
        total += (value or 0) / 1e6
        sums.append(total)
    return tuple(sums)
