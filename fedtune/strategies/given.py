"""What a caller gives `fedtune.aggregate`: of the right types, before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import ConfigError, ManifestError

__all__ = ["given_reference", "given_updates", "given_weights", "is_number"]

LEAST, MOST = 1e-100, 1e100  # of a weight: products with values stay far from the ends of fp64
Tensors = Mapping[str, Tensor]


def given_updates(updates: Any) -> list[dict[str, Tensor]]:
    """One dict of tensors per client, without their gradients.

    Raises:
        ConfigError: something else; the message names the client and the tensor.
    """
    if not isinstance(updates, Sequence) or isinstance(updates, str):
        raise ConfigError(
            "updates: expected a list with one dict of tensors per client, received "
            f"{_kind(updates)}. Give a list, of one update too."
        )
    if not updates:
        raise ConfigError("aggregate: expected at least one update, received none.")
    return [_tensors(f"update {client}", update) for client, update in enumerate(updates)]


def given_reference(reference: Any) -> dict[str, Tensor]:
    """The previous global parameters; empty where there are none.

    Raises:
        ConfigError: no dict of tensors.
        ManifestError: a value that is not finite.
    """
    if reference is None:
        return {}
    tensors = _tensors("reference", reference)
    for name, tensor in sorted(tensors.items()):
        if not bool(torch.isfinite(tensor).all()):
            raise ManifestError(
                f"reference: `{name}`: expected finite numbers, received NaN or Inf among them. "
                "Give the global parameters of the round before."
            )
    return tensors


def given_weights(weights: Any, clients: int) -> list[float]:
    """One positive number per client; equal ones for None.

    Raises:
        ConfigError: another number of them, or one that is no number > 0.
    """
    if weights is None:
        return [1.0] * clients
    if isinstance(weights, Tensor) or hasattr(weights, "tolist"):  # an array is a list of numbers
        weights = weights.tolist()
    listed = isinstance(weights, Sequence) and not isinstance(weights, str)
    given = list(weights) if listed else [weights]
    good = [is_number(weight) and LEAST <= weight <= MOST for weight in given]
    if not listed or len(given) != clients or not all(good):
        raise ConfigError(
            f"weights: expected {clients} numbers > 0, received {weights!r}. Give one per update "
            f"({LEAST:g} to {MOST:g}), or leave them out."
        )
    return [float(weight) for weight in given]


def is_number(value: Any) -> bool:
    """Whether it is a real number: no text, no bool, no complex number; NaN and Inf are."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _tensors(where: str, values: Any) -> dict[str, Tensor]:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where}: expected a dict of tensors by name, received {_kind(values)}. "
            "Give what `fedtune.adapters.collect` returns, or a state dict."
        )
    for name, tensor in values.items():
        if not isinstance(name, str):
            raise ConfigError(f"{where}: expected names as text, received {name!r}. Rename it.")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            kind = "a sparse or empty one" if isinstance(tensor, Tensor) else _kind(tensor)
            raise ConfigError(
                f"{where}: `{name}`: expected a dense torch tensor, received {kind}. "
                "Convert it (torch.as_tensor, to_dense)."
            )
    return {name: tensor.detach() for name, tensor in values.items()}


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
