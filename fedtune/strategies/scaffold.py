"""SCAFFOLD: clients correct for their drift by control variates (Karimireddy et al. 2020).

    client:  g <- g - c_k + c,   c_k+ = mean of g over the round
    server:  x <- sum_k p_k y_k,   c <- c + |S| / N sum_k p_k (c_k+ - c_k)

arXiv 1910.06378; S are the clients of the round, N all that ever took part: who comes later starts
with c_k = 0, who leaves is counted with his last one, as one that is not sampled. The paper's
option II, c_k+ = c_k - c + (x - y) / (steps lr), is this mean under SGD at a constant rate, and is
off by the optimizer's scale under AdamW; the mean is right under both. With equal weights the step
of c is the paper's; with others c stays sum_k p_k c_k, so that the fixed point is the weighted
objective's.

Travels: one control variate beside the parameters, both ways. Memory: one at the server, three
copies of the trained parameters at the client, which keeps c_k between its rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.strategies.base import Correction, Seen

__all__ = ["Scaffold", "next_control", "widened"]


CONTROL = "control"


@dataclass(frozen=True)
class Scaffold(Correction):
    """Control variates; no settings. A server learning rate is another axis: `scaffold+fedavgm`."""

    name: ClassVar[str] = "scaffold"
    extras: ClassVar[Mapping[str, str]] = {CONTROL: "control variate"}

    def advance(
        self,
        extras: Mapping[str, Mapping[str, Tensor]],
        changes: Mapping[str, Mapping[str, Tensor]],
        seen: Seen,
    ) -> dict[str, dict[str, Tensor]]:
        """The server's c after a round."""
        control = widened(extras.get(CONTROL, {}), seen.before, seen.ever)
        change = changes.get(CONTROL, {})
        return {CONTROL: control | next_control(control, change, seen.now / seen.ever)}


def widened(control: Mapping[str, Tensor], before: int, clients: int) -> dict[str, Tensor]:
    """C over `clients` instead of `before` of them: who is new has c_k = 0."""
    factor = before / clients if before else 1.0
    return {
        name: (value.double() * factor).to(value.dtype) if factor != 1.0 else value
        for name, value in control.items()
    }


def next_control(
    control: Mapping[str, Tensor], mean_change: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """The server's c plus `share`, |S| / N, times the mean of c_k+ - c_k; a missing c is zero."""
    return {
        name: (control.get(name, torch.zeros_like(change)).double() + share * change.double()).to(
            change.dtype
        )
        for name, change in mean_change.items()
    }
