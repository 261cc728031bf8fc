"""Whether updates can be aggregated: what they hold, against each other and against the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.adapters import Entry, Manifest
from fedtune.errors import ConfigError, ManifestError
from fedtune.strategies.base import Properties
from fedtune.strategies.lora.configs import why_not_config
from fedtune.strategies.lora.manifests import like, ranks_of
from fedtune.strategies.lora.names import is_lora_a, is_lora_b, lora_modules, variants
from fedtune.strategies.registry import for_mixed_ranks

__all__ = [
    "check_agreement",
    "check_manifest",
    "check_ranks",
    "check_reference",
    "check_variants",
    "rank_objection",
]

MOST_RANK = 64  # that a client may have even in a smaller layer
DORA = "a DoRA weight is normalised, so a product of factors is not what it adds"


def check_manifest(method: str, properties: Properties, manifest: Manifest) -> None:
    """Refuse an adapter that the method is not right for, before anything is trained.

    Raises:
        ConfigError: by its tensors, by PEFT's options, or a convolution where factors are needed.
    """
    check_variants(method, properties, [*manifest.entries])
    reason = why_not_config(properties, manifest.adapter_config)
    if reason is not None:
        raise ConfigError(f"{method}: expected plain LoRA, received {reason}. Use fedavg or fedit.")
    needs_matrices = properties.changes_base or properties.refactors or properties.mixed_ranks
    for name, entry in manifest.entries.items():
        factor = is_lora_a(name) or is_lora_b(name)
        if properties.variants is not None and needs_matrices and factor and len(entry.shape) != 2:
            raise ConfigError(
                f"{method}: expected matrices (Linear, Conv1D, Embedding), received `{name}` with "
                f"{len(entry.shape)} dimensions. Use fedit for convolutions."
            )


def check_variants(method: str, properties: Properties, names: Sequence[str]) -> None:
    """Refuse kinds of tensors that the method is not right for; raises ConfigError."""
    allowed = properties.variants
    found = sorted(variants(names) - (allowed or variants(names)))
    if allowed is None or not found:
        return
    reason = f": {DORA}" if found[0] == "dora" else ""
    advice = "fedavg" if "other" in found else "fedavg or fedit"
    raise ConfigError(
        f"{method}: expected {', '.join(sorted(allowed))} tensors, received {found[0]}{reason}. "
        f"Use {advice}."
    )


def check_ranks(manifest: Manifest | None) -> None:
    """Refuse ranks that no layer can have, before memory is taken for them.

    Raises:
        ManifestError: names the first layer.
    """
    entries = {**manifest.entries, **manifest.static} if manifest else {}
    modules = lora_modules(entries)
    for name, rank in ranks_of(manifest).items() if manifest else ():
        factors = [name for name in (modules[name].a, modules[name].b) if name in entries]
        sizes = [size for factor in factors for size in entries[factor].shape if size != rank]
        if not 0 < rank <= max([MOST_RANK, *sizes]):
            raise ManifestError(
                f"`{name}`: expected a rank that fits the layer, received {rank}. Lower r."
            )


def rank_objection(expected: Manifest, built: Manifest) -> str:
    """What is wrong where an adapter has other ranks, and nothing else is; else empty."""
    ours, theirs = ranks_of(expected), ranks_of(built)
    if ours == theirs or like(expected, built).objection_to(built.frozen(expected.static)):
        return ""
    name = next(name for name in ours if ours[name] != theirs[name])
    return (
        f"LoRA rank: expected {ours[name]} as at the first site, built {theirs[name]}. Use one r "
        f"everywhere, or a --strategy for mixed ranks: {for_mixed_ranks()}."
    )


def check_agreement(
    method: str, properties: Properties, updates: Sequence[Mapping[str, Tensor]]
) -> None:
    """Refuse updates that differ in names, shapes or dtypes, or are not finite.

    LoRA ranks may differ where the method allows it.

    Raises:
        ManifestError: names the client (from 0) and the first tensor, in sorted order.
    """
    first = updates[0]
    for client, update in enumerate(updates):
        for name in sorted({*first, *update}):
            if name not in update or name not in first:
                which = "is missing" if name not in update else "is in no other"
                raise ManifestError(
                    f"update {client}: `{name}` {which}: expected the {len(first)} tensors of "
                    f"update 0, received {len(update)}. Send the same tensors everywhere."
                )
            _check_tensor(f"update {client}: `{name}`", method, properties, first, update, name)
        _check_ranks(f"update {client}", update)


def check_reference(
    method: str,
    properties: Properties,
    update: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
) -> None:
    """Refuse a reference that is not what an update has changed: other shapes or dtypes.

    What it holds beside the tensors of the update is static, and completes its LoRA layers.

    Raises:
        ManifestError: names the first tensor, in sorted order.
    """
    for name in sorted(reference.keys() & update.keys()):
        _check_tensor(f"reference: `{name}`", method, properties, update, reference, name)
    modules = lora_modules(update).values()
    held = {name for module in modules for name in (module.a, module.b)}
    _check_ranks("reference", {name: reference[name] for name in held & reference.keys()})
    static = {name: reference[name] for name in held & reference.keys() - update.keys()}
    _check_ranks("reference", {**static, **update})


def _check_tensor(
    where: str,
    method: str,
    properties: Properties,
    first: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    name: str,
) -> None:
    expected, tensor = Entry.of(first[name]), update[name]
    received = Entry.of(tensor)
    if received != expected:
        free = {0} if is_lora_a(name) else {1} if is_lora_b(name) else set()
        if received.dtype != expected.dtype or _differ(received, expected) - free:
            raise ManifestError(
                f"{where}: expected {expected} as in update 0, received {received}. "
                "Send the same shapes and dtypes everywhere."
            )
        if not properties.mixed_ranks:
            raise ManifestError(
                f"{where}: {method} expected equal ranks, received {expected} and {received}. "
                f"Use {for_mixed_ranks()}."
            )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise ManifestError(
            f"{where}: expected finite floating-point numbers, received {received} with others. "
            "Leave this update out."
        )


def _differ(left: Entry, right: Entry) -> set[int]:
    """Dimensions in which two shapes differ; -1 for their number."""
    if len(left.shape) != len(right.shape):
        return {-1}
    pairs = enumerate(zip(left.shape, right.shape, strict=True))
    return {i for i, (one, other) in pairs if one != other}


def _check_ranks(where: str, update: Mapping[str, Tensor]) -> None:
    """Refuse factors that are no matrices (or convolutions) of one rank, at least 1."""
    for module in lora_modules(update).values():
        for name in (module.b, module.a):
            if name in update and (update[name].ndim < 2 or not update[name].numel()):
                raise ManifestError(
                    f"{where}: `{name}`: expected a LoRA factor, (out, r) or (r, in), received "
                    f"{Entry.of(update[name])}. Send what `collect` returns."
                )
        if module.b in update and module.a in update:
            b, a = update[module.b].shape[1], update[module.a].shape[0]
            if a != b:
                raise ManifestError(
                    f"{where}: `{module.name}`: expected one rank, received {b} in lora_B "
                    f"and {a} in lora_A. Send both factors of one adapter."
                )
