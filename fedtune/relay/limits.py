"""What a site allows a server to ask of it, whatever the plan says."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.errors import SiteError
from fedtune.relay.folder import SitePlan

__all__ = ["Limits", "check_plan", "check_steps"]


@dataclass(frozen=True)
class Limits:
    """A site's own limits; 0 is none.

    Attributes:
        max_rounds: rounds of a run.
        max_steps: optimizer steps of a whole run, rounds x steps per round.
        start_timeout_s: how long the site's script may take until its Trainer is there.
    """

    max_rounds: int = 0
    max_steps: int = 0
    start_timeout_s: float = 600.0


def check_plan(plan: SitePlan, limits: Limits) -> None:
    """Refuse a plan beyond the limits, as far as it can be known before the trainer has started.

    A budget in epochs becomes steps only in the trainer, and `patch()` may bring a budget of its
    own: the trainer calls `check_steps` with what it will really do.
    """
    for name, value, least in (("num_rounds", plan.num_rounds, 1), ("steps", plan.steps, 0)):
        if value < least:
            raise SiteError(
                f"{name}: expected at least {least}, received {value}. Submit another plan."
            )
    if 0 < limits.max_rounds < plan.num_rounds:
        raise SiteError(
            f"num_rounds: this site allows at most {limits.max_rounds}, received "
            f"{plan.num_rounds}. Submit with --num_rounds {limits.max_rounds}, or ask the site to "
            "raise --max_rounds."
        )
    if plan.steps:
        check_steps(plan.num_rounds, plan.steps, limits.max_steps)


def check_steps(num_rounds: int, steps: int, max_steps: int) -> None:
    """Refuse rounds x steps above `max_steps` (0: no limit). Raises SiteError."""
    if 0 < max_steps < num_rounds * steps:
        raise SiteError(
            f"steps: this site allows at most {max_steps} in a run, received {num_rounds} rounds x "
            f"{steps} = {num_rounds * steps}. Submit fewer rounds or a smaller --steps_per_round, "
            "or ask the site to raise --max_steps."
        )
