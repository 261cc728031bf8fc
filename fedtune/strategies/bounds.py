"""What one client's reply may do to the others: how long its update, how heavy its weight may be.

Both are known before a reply is folded, so that a refused one leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Literal

from torch import Tensor

from fedtune.config import FederationArguments
from fedtune.strategies.norms import (
    CONTROL_NORM,
    FIRST,
    NORM,
    Bound,
    Record,
    bound_of,
    length,
    shortened,
    squared_distance,
)
from fedtune.strategies.updates import Update, UpdateRefusedError

__all__ = ["DEFAULT", "Bounds", "Judge"]

FIX = "Lower the learning rate there, or use --update_check clip"


@dataclass(frozen=True)
class Bounds:
    """Settings.

    Attributes:
        max_client_weight: largest share of a round's weights that one client may have, where three
            or more are asked.
        max_update_norm: largest norm of an update, or None.
        update_check: whether a longer one is refused, or scaled down to the bound.
    """

    max_client_weight: float = 0.5
    max_update_norm: float | None = None
    update_check: Literal["refuse", "clip"] = "refuse"

    @classmethod
    def of(cls, federation: FederationArguments) -> Bounds:
        """From the flags."""
        return cls(
            federation.max_client_weight, federation.max_update_norm, federation.update_check
        )

    def judge(
        self,
        rounds: Sequence[Record],
        params: Mapping[str, Tensor],
        control: Mapping[str, Tensor],
        risen: Mapping[str, float],
    ) -> Judge:
        """Of the next attempt at a round.

        Args:
            rounds: records of finished rounds in which the same tensors trained.
            params: the global parameters.
            control: the server's control variate; empty without.
            risen: what `Judge.risen` said of the attempt before.
        """

        @cache
        def first() -> float:
            return FIRST * (1.0 + length(params))

        def first_control() -> float:
            return max(first(), FIRST * (1.0 + length(control)))

        return Judge(
            bound_of(
                rounds, NORM, first=first, absolute=self.max_update_norm, risen=risen.get(NORM)
            ),
            bound_of(rounds, CONTROL_NORM, first=first_control, risen=risen.get(CONTROL_NORM)),
            clips=self.update_check == "clip",
        )


DEFAULT = Bounds()


class Judge:
    """Holds the updates of one attempt at a round against their bounds.

    Attributes:
        norms: of every update that came, by kind; those above their bound are in `above`.
    """

    def __init__(self, params: Bound, control: Bound, *, clips: bool) -> None:
        self.params, self._control, self._clips = params, control, clips
        self.norms: dict[str, list[float]] = {NORM: [], CONTROL_NORM: []}
        self.above: dict[str, list[float]] = {NORM: [], CONTROL_NORM: []}

    def admit(self, update: Update, start: Mapping[str, Tensor]) -> Update:
        """The update as it is folded, with its norm.

        Args:
            start: what the client was sent.

        Raises:
            UpdateRefusedError: it is too long, or so long that there is no telling how long.
        """
        squared, steps = squared_distance(update.params, start), update.stats.num_steps
        norm = math.sqrt(squared)
        factor = self._factor(norm, NORM, self.params.most(steps))
        if factor < 1.0:
            params = shortened(update.params, start, factor)
            squared = squared_distance(params, start)
            update = replace(update, params=params, clipped_from=norm)
        update = replace(update, squared_norm=squared)
        if not update.control_change:
            return update
        norm = length(update.control_change)
        factor = self._factor(norm, CONTROL_NORM, self._control.most(0))  # a mean over the steps
        if factor < 1.0:
            control = shortened(update.control_change, None, factor)
            return replace(update, control_change=control, control_norm=norm * factor)
        return replace(update, control_norm=norm)

    def risen(self, asked: int, there: int) -> dict[str, float]:
        """Medians of the kinds in which most of the clients that were asked are above the bound.

        Args:
            there: clients that take part in the run; one alone of several does not tell.
        """
        if asked < min(2, there):
            return {}
        most = {kind: above for kind, above in self.above.items() if 2 * len(above) > asked}
        return {kind: median(self.norms[kind]) for kind in most}

    def _factor(self, norm: float, kind: str, bound: tuple[float, str]) -> float:
        """How much of a vector is folded; raises UpdateRefusedError."""
        most, why = bound
        self.norms[kind].append(norm)
        if norm <= most:
            return 1.0
        self.above[kind].append(norm)
        if self._clips and math.isfinite(norm):
            return most / norm
        what = "the update" if kind == NORM else "the control variate's change"
        raise UpdateRefusedError(
            f"norm of {what}: expected at most {most:.4g} ({why}), received {norm:.4g}. {FIX}"
        )
