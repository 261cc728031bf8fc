"""The verdict of a run in words and numbers: what terminal and report both say."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.report import figures
from fedtune.report.concerns import made_worse
from fedtune.report.ending import ending
from fedtune.results.series import final, last
from fedtune.results.summary import Summary
from fedtune.results.verdict import Spread

__all__ = [
    "Check",
    "Gap",
    "checks",
    "finding",
    "gaps",
    "headline",
    "spread_text",
]


@dataclass(frozen=True)
class Gap:
    """One comparison; a positive gap is worse for federated, a positive gain is better."""

    arm: str
    title: str
    other: float | None
    spread: Spread
    good: bool  # federated is at least as good
    samples: str  # `at equal samples`, or how many each has seen

    @property
    def is_equal(self) -> bool:
        """The difference is less than a percentage shows."""
        return abs(self.spread.mean or 0) < 0.005

    @property
    def size(self) -> str:
        """`+1.3 %`, or `equal`."""
        return "equal" if self.is_equal else figures.percent(self.spread.mean, signed=True)

    @property
    def within_noise(self) -> bool:
        """The difference is smaller than its own spread over seeds."""
        return bool(self.spread.std) and abs(self.spread.mean or 0) <= (self.spread.std or 0)


@dataclass(frozen=True)
class Check:
    """A control: whether it holds, and what that shows."""

    title: str
    holds: bool
    words: str


def gaps(summary: Summary) -> list[Gap]:
    """Federated against each arm it was compared with, in the order of the verdict."""
    verdict = summary.verdict
    rows = []
    for arm, title, spread, sign in (
        ("centralized", "Gap to centralized", verdict.gap_centralized_pct, -1),
        ("centralized_large_batch", "Gap to large batch", verdict.gap_large_batch_pct, -1),
        ("local", "Gain over local only", verdict.gain_over_local_pct, 1),
    ):
        if spread is not None and spread.mean is not None:
            other = final(summary.arms[arm].mean.eval_loss) if arm in summary.arms else None
            good = sign * spread.mean >= 0
            rows.append(Gap(arm, title, other, spread, good, _samples(summary, arm)))
    return rows


def headline(summary: Summary) -> str:
    """The one sentence to remember: how the run ended, where it did not complete."""
    return ending(summary) or finding(summary)


def finding(summary: Summary) -> str:
    """What the comparison found, as far as it came."""
    series = summary.federated.mean.eval_loss
    before, after = summary.base_loss, last(series[1:])
    if before is None:
        before = next(iter(series), None)
    rounds = f"{summary.rounds} round{'' if summary.rounds == 1 else 's'}"
    if after is None:
        return f"No held-out loss was recorded in {rounds}."
    if worse := made_worse(summary):
        return f"{worse[0].upper()}{worse[1:]}."
    gap = next((gap for gap in gaps(summary) if gap.arm != "local"), None)
    if gap is not None:
        return _of_gap(gap)
    if before is None:
        return f"Federated training reaches a held-out loss of {figures.loss(after)} in {rounds}."
    verb = "lowers" if after < before else "does not lower"
    return (
        f"Federated training {verb} held-out loss: "
        f"{figures.loss(before)} to {figures.loss(after)} in {rounds}."
    )


def _of_gap(gap: Gap) -> str:
    size, other = figures.percent(abs(gap.spread.mean or 0)), gap.arm.replace("_", " ")
    if gap.is_equal:
        return f"Federated loss ends equal to {other} {gap.samples}."
    if gap.within_noise:
        return f"No measurable gap to {other}: {size}, less than the seeds differ."
    side = "below" if gap.good else "above"
    return f"Federated loss ends {size} {side} {other} {gap.samples}."


def _samples(summary: Summary, arm: str) -> str:
    """`at equal samples` where the run says that an arm ends within a batch, else the counts."""
    counts = [
        summary.arms[name].mean.samples for name in ("federated", arm) if name in summary.arms
    ]
    ours, other = final(counts[0]), final(counts[-1])
    if ours is None or other is None:
        return "at samples not counted"
    if summary.verdict.equal_samples.get(arm, ours == other):
        return "at equal samples"
    return f"at {figures.count(ours)} samples against {figures.count(other)}"


def checks(summary: Summary) -> list[Check]:
    """The controls that were run."""
    found = (_fixed_global(summary), _parity(summary))
    return [check for check in found if check is not None]


def spread_text(spread: Spread, seeds: int) -> str:
    """`± 0.4 over 3 seeds`, or `1 seed`."""
    if seeds < 2 or spread.std is None:
        return "1 seed" if seeds < 2 else f"{seeds} seeds"
    digits = 1 if spread.std >= 0.1 or spread.std == 0 else 2
    return f"\N{PLUS-MINUS SIGN} {spread.std:.{digits}f} over {seeds} seeds"


def _fixed_global(summary: Summary) -> Check | None:
    title = "Fixed-global control"
    arm = summary.arms.get("fixed_global")
    known = [value for value in arm.mean.eval_loss if value is not None] if arm else []
    if len(known) < 2:
        return None
    moved, rounds = max(known) - min(known), len(known) - 1
    if moved:  # equal to the last bit, or something other than the global parameters is used
        words = f"moves by {moved:.2g}: clients do not use what the server sends"
        return Check(title, False, words)
    times = f"all {rounds} rounds" if rounds > 1 else "1 round"
    words = f"flat at {figures.loss(known[0])} over {times}: clients use what the server sends"
    return Check(title, True, words)


def _parity(summary: Summary) -> Check | None:
    parity = summary.verdict.parity
    if parity is None:
        return None
    if parity.identical:
        return Check("One-client parity", True, "identical to the plain Trainer at every step")
    step = "an unknown step" if parity.first_diff_step is None else f"step {parity.first_diff_step}"
    words = f"differs from the plain Trainer, first at {step}"
    return Check("One-client parity", False, words)
