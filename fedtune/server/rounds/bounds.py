"""What one client's reply may do to the others: how long its update, how heavy its weight may be.

Both are known before a reply is folded, so that a refused one leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from statistics import median
from typing import Literal

from torch import Tensor

from fedtune.config import FederationArguments
from fedtune.server.rounds.check_update import Update, UpdateRefusedError
from fedtune.server.rounds.norms import FIRST, NORM, Bound, Record, bound_of, norm_key
from fedtune.strategies.vectors import length, shortened, squared_distance

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
        extras: Mapping[str, tuple[str, Mapping[str, Tensor]]],
        risen: Mapping[str, float],
    ) -> Judge:
        """Of the next attempt at a round.

        Args:
            rounds: records of finished rounds in which the same tensors trained.
            params: the global parameters.
            extras: name -> what it is called, and the server's tensors of it.
            risen: what `Judge.risen` said of the attempt before.
        """

        @cache
        def first() -> float:
            return FIRST * (1.0 + length(params))

        def kind(key: str, what: str, longest: Callable[[], float], most: float | None) -> Kind:
            bound = bound_of(rounds, key, first=longest, absolute=most, risen=risen.get(key))
            return Kind(key, what, bound)

        def first_of(tensors: Mapping[str, Tensor]) -> float:
            return max(first(), FIRST * (1.0 + length(tensors)))

        return Judge(
            kind(NORM, "the update", first, self.max_update_norm),
            {
                name: kind(norm_key(name), f"the {what}'s change", partial(first_of, tensors), None)
                for name, (what, tensors) in extras.items()
            },
            clips=self.update_check == "clip",
        )


DEFAULT = Bounds()


@dataclass
class Kind:
    """One of the vectors that a client sends.

    Attributes:
        key: of its norm, in the record of a reply.
        what: it is, in an error.
        bound: on its norm.
        norms: of all that came; those above the bound are in `above` too.
    """

    key: str
    what: str
    bound: Bound
    norms: list[float] = field(default_factory=list)
    above: list[float] = field(default_factory=list)


class Judge:
    """Holds the updates of one attempt at a round against their bounds.

    Args:
        params: the parameters' bound.
        extras: the bounds of what comes beside them, by name.
        clips: whether what is too long is scaled down, or refused.
    """

    def __init__(self, params: Kind, extras: Mapping[str, Kind], *, clips: bool) -> None:
        self.params, self.extras, self._clips = params, extras, clips

    def admit(self, update: Update, start: Mapping[str, Tensor]) -> Update:
        """The update as it is folded, with its norm.

        Args:
            start: what the client was sent.

        Raises:
            UpdateRefusedError: it is too long, or so long that there is no telling how long.
        """
        squared, steps = squared_distance(update.params, start), update.stats.num_steps
        norm = math.sqrt(squared)
        factor = self._factor(norm, self.params, steps)
        if factor < 1.0:
            params = shortened(update.params, start, factor)
            squared = squared_distance(params, start)
            update = replace(update, params=params, clipped_from=norm)
        update = replace(update, squared_norm=squared)
        extras, norms = dict(update.extras), {}
        for name, change in update.extras.items():
            norm = length(change)
            factor = self._factor(norm, self.extras[name], 0)  # a mean over the steps
            norms[name] = norm * factor
            if factor < 1.0:
                extras[name] = shortened(change, None, factor)
        return replace(update, extras=extras, extra_norms=norms)

    def risen(self, asked: int, there: int) -> dict[str, float]:
        """Medians of the kinds in which most of the clients that were asked are above the bound.

        Args:
            there: clients that take part in the run; one alone of several does not tell.
        """
        if asked < min(2, there):
            return {}
        kinds = (self.params, *self.extras.values())
        return {one.key: median(one.norms) for one in kinds if 2 * len(one.above) > asked}

    def _factor(self, norm: float, kind: Kind, steps: int) -> float:
        """How much of a vector is folded; raises UpdateRefusedError."""
        most, why = kind.bound.most(steps)
        kind.norms.append(norm)
        if norm <= most:
            return 1.0
        kind.above.append(norm)
        if self._clips and math.isfinite(norm):
            return most / norm
        raise UpdateRefusedError(
            f"norm of {kind.what}: expected at most {most:.4g} ({why}), received {norm:.4g}. {FIX}"
        )
