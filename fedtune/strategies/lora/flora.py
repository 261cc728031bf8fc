"""FLoRA: stack the clients' factors, add their product to the base, start anew (arXiv 2409.05976).

    B = [p_1 s B_1 | ... | p_K s B_K],  A = [A_1; ...; A_K],   W <- W + B A = W + sum p_k s B_k A_k

exactly, whatever the ranks. The adapter starts again as PEFT starts it: one factor random (equal at
all clients, new in every round), the other 0. Its rank is the global one; a client with a lower
rank takes the first rows, which changes nothing while the product is 0. The restart makes
Adam's moments of the clients meaningless. Server memory: clients x adapter; every client receives
the stack, sum r_k columns a layer. No DoRA, no secure aggregation, no quantized base without
`cumulative.py`.
Not for experts (`target_parameters`), aLoRA and the like, whose layers add no such product to a
fixed weight (`configs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.strategies.base import Properties
from fedtune.strategies.lora.product_rule import BaseRule, NewLayer, Terms
from fedtune.strategies.lora.ranks import initial
from fedtune.strategies.settings import COUNT, setting

__all__ = ["FLoRA"]


@dataclass(frozen=True)
class FLoRA(BaseRule):
    """Stacking.

    Attributes:
        max_rank: largest rank of the frozen adapter beside the base; 0 for no bound.
        tolerance: relative error that recompressing it may make in a round.
        seed: of the fresh adapters.
    """

    seed: int = setting(0, COUNT)

    properties: ClassVar[Properties] = Properties(
        sum_suffices=False,
        changes_base=True,
        refactors=True,
        products="exact",
        mixed_ranks=True,
        qlora_safe=False,
        variants=frozenset({"lora"}),
    )

    def combine(self, terms: Terms) -> NewLayer:
        """A fresh adapter, and everything learned as a term for the base."""
        update = terms.update()
        out_dim, in_dim = update.B.shape[0], update.A.shape[1]
        key = f"{int(self.seed)}/{terms.server_round}"
        return NewLayer(initial(terms.module, out_dim, in_dim, terms.rank, key), update)
