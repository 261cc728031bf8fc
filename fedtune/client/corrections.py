"""What FedProx and SCAFFOLD do at the client: a change of the gradient, in any Trainer.

    fedprox    g <- g + mu (y - x)                    x: parameters at the start of the round
    scaffold   g <- g - c_k + c,  c_k+ = mean of g    c: the server's control, c_k: the client's

Where it lies: once per optimizer step, on the gradient that the optimizer is about to use, so after
accumulation over micro-batches, unscaling and clipping (`on_pre_optimizer_step`). The correction
itself is not clipped. In the mean too, g is the clipped gradient: c_k has to stand for what it is
taken from. Under AdamW the corrected gradient enters the moments.

What stays with the client has no global value to be pulled to, so it is not corrected.

Limits: parameters must be whole (no FSDP, no DeepSpeed). SCAFFOLD needs every step to be taken; the
loss scaler of fp16 does not promise that, bf16 does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fedtune.adapters.names import trainable_tensors
from fedtune.errors import ConfigError

__all__ = [
    "ControlVariates",
    "GradientCorrection",
    "ProximalTerm",
    "make_correction",
]


class GradientCorrection(Protocol):
    """One round of one client."""

    def begin(self, model: nn.Module, without: Collection[str] = ()) -> None:
        """The global parameters have just been loaded into `model`; `without`: not corrected."""

    def apply(self) -> None:
        """Change the gradients in place; called once per optimizer step."""


class ProximalTerm:
    """FedProx: g + mu (y - x)."""

    def __init__(self, mu: float) -> None:
        self._mu = mu
        self._anchors: list[tuple[Tensor, Tensor]] = []

    def begin(self, model: nn.Module, without: Collection[str] = ()) -> None:
        """Remember x."""
        self._anchors = [
            (parameter, _precise(parameter).clone())
            for name, parameter in trainable_tensors(model).items()
            if name not in without
        ]

    @torch.no_grad()
    def apply(self) -> None:
        """Pull every parameter back to x."""
        _require_gradients(parameter for parameter, _ in self._anchors)
        for parameter, anchor in self._anchors:
            if parameter.grad is not None:
                pull = (_precise(parameter) - anchor).mul_(self._mu)
                parameter.grad.copy_(_precise(parameter.grad) + pull)


class ControlVariates:
    """SCAFFOLD: g - c_k + c.

    Args:
        control: c, by canonical name; a missing one is zero.
        own: c_k, likewise.
    """

    def __init__(self, control: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self._control, self._own = control, own
        self._terms: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def begin(self, model: nn.Module, without: Collection[str] = ()) -> None:
        """Put c - c_k beside every parameter and start the sum of gradients."""
        self._terms, self._sums, self._steps = [], {}, 0
        for name, parameter in trainable_tensors(model).items():
            if name in without:
                continue
            total = torch.zeros_like(_precise(parameter))
            shift = torch.zeros_like(total)
            if name in self._control:
                shift += self._control[name].to(shift)
            if name in self._own:
                shift -= self._own[name].to(shift)
            self._sums[name] = total
            self._terms.append((parameter, shift, total))

    @torch.no_grad()
    def apply(self) -> None:
        """Add the gradient to the sum, then correct it."""
        _require_gradients(parameter for parameter, _, _ in self._terms)
        self._steps += 1
        for parameter, shift, total in self._terms:
            if parameter.grad is not None:
                gradient = _precise(parameter.grad)
                total += gradient
                parameter.grad.copy_(gradient + shift)

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """c_k+, and c_k+ - c_k of what was trained, on the CPU; the rest keeps its c_k.

        c_k+ is c_k plus that change as the server adds it: rounding never parts c from its sum.
        """
        own = {name: value.cpu() for name, value in self._own.items()}
        change: dict[str, Tensor] = {}
        for name, total in self._sums.items():
            before = own.get(name, torch.zeros_like(total, device="cpu"))
            mean = (total / self._steps).cpu() if self._steps else before
            change[name] = mean - before.to(mean)
            own[name] = (before.double() + change[name].double()).to(mean.dtype)
        return own, change


def make_correction(
    name: str,
    settings: Mapping[str, float],
    control: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> GradientCorrection:
    """What the server's method wants its clients to do; controls as for `ControlVariates`."""
    if name == "fedprox":
        return ProximalTerm(**settings)
    if name == "scaffold":
        return ControlVariates(control, own)
    raise ConfigError(
        f"correction: expected fedprox or scaffold, received {name!r}. Use the same fedtune "
        "release everywhere."
    )


def _precise(tensor: Tensor) -> Tensor:
    """Without graph, at least fp32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _require_gradients(parameters: Iterable[Tensor]) -> None:
    if all(parameter.grad is None for parameter in parameters):
        raise ConfigError(
            "--strategy: expected gradients beside the parameters, found none: sharded training "
            "(FSDP, DeepSpeed) hides them. Train whole, or leave the client correction out."
        )
