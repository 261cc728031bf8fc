"""The mean of updates of which all share one factor, so that it is the mean of the products too.

    sum p_k s B_k A = s (sum p_k B_k) A          and the same with the roles of A and B exchanged

Both factors trained at once would be averaged with an error (their covariance) and nobody would
notice, so this fold compares the factor that has to be shared. Server memory: one running sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedtune.errors import ManifestError
from fedtune.strategies.lora.names import lora_modules
from fedtune.strategies.mean import RunningMean

__all__ = ["SharedFactorMean"]


class SharedFactorMean:
    """A running mean that refuses a layer of which no factor is shared.

    Args:
        rule: name for the message.
        may_be_shared: which factors (by name) may be the shared one.
    """

    def __init__(self, rule: str, may_be_shared: Callable[[str], bool]) -> None:
        self._rule = rule
        self._may_be_shared = may_be_shared
        self._mean = RunningMean()
        self._shared: dict[str, Tensor] = {}
        self._modules = lora_modules(())

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Fold one client's parameters in; a factor that does not travel is a shared one."""
        modules, before = self._modules, self._shared
        if not modules:
            modules = lora_modules(params)
            before = {n: value for n, value in params.items() if self._may_be_shared(n)}
        shared = {n: v for n, v in before.items() if torch.equal(v, params[n])}
        for module in modules.values():
            candidates = [name for name in (module.b, module.a) if self._may_be_shared(name)]
            if not any(name in shared or name not in params for name in candidates):
                raise ManifestError(
                    f"`{module.name}`: {self._rule} expected one factor that is equal at all "
                    "clients, received different ones. Distribute it once and keep it frozen, or "
                    "use fedex_lora, which is exact for both."
                )
        self._mean.add(params, weight)
        self._modules, self._shared = modules, shared

    def result(self) -> dict[str, Tensor]:
        """The mean; a shared factor comes back as it was."""
        return self._mean.result()
