"""One adapter at other ranks, as its manifest sees it: shapes, PEFT's config, scaling.

PEFT scales by alpha / r (rsLoRA: alpha / sqrt r), so alpha goes with the rank and s stays. Where
layers differ, `rank_pattern` and `alpha_pattern` name each of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedtune.adapters import Entry, Manifest
from fedtune.strategies.lora.cumulative import Cumulative, one_adapter
from fedtune.strategies.lora.names import lora_modules

__all__ = ["at_ranks", "joined", "like", "rank_total", "ranks_in", "ranks_of"]

WRAPPER = "base_model.model."  # PEFT's patterns name modules without it


def ranks_of(manifest: Manifest) -> dict[str, int]:
    """Module -> rank of its factors; empty where there is no LoRA of matrices."""
    entries = {**manifest.entries, **manifest.static}
    return {
        name: entries[module.a].shape[0]
        for name, module in lora_modules(entries).items()
        if module.a in entries and len(entries[module.a].shape) == 2
    }


def rank_total(manifest: Manifest) -> int:
    """Sum of all ranks: what a client can hold."""
    return sum(ranks_of(manifest).values())


def ranks_in(params: Mapping[str, Tensor]) -> dict[str, int]:
    """The same of tensors."""
    return {
        name: params[module.a].shape[0]
        for name, module in lora_modules(params).items()
        if module.a in params and params[module.a].ndim == 2
    }


def like(manifest: Manifest, other: Manifest) -> Manifest:
    """`manifest` at the ranks of `other`, where that has the same modules."""
    ranks = ranks_of(other)
    return at_ranks(manifest, ranks) if ranks.keys() == ranks_of(manifest).keys() else manifest


def at_ranks(
    manifest: Manifest,
    ranks: int | Mapping[str, int],
    scaling: Mapping[str, float] | None = None,
) -> Manifest:
    """The same adapter at other ranks: one for all, or by module; `scaling`: s if it changes."""
    modules = ranks_of(manifest)
    wanted = dict.fromkeys(modules, ranks) if isinstance(ranks, int) else {**modules, **ranks}
    scales = dict(scaling or manifest.scaling)
    if wanted == modules and scales == manifest.scaling:
        return manifest
    entries, static = (_resized(group, wanted) for group in (manifest.entries, manifest.static))
    config = {**manifest.adapter_config, **_config(manifest.adapter_config, wanted, scales)}
    return replace(manifest, entries=entries, static=static, scaling=scales, adapter_config=config)


def joined(
    params: Mapping[str, Tensor], manifest: Manifest, base: Cumulative
) -> tuple[dict[str, Tensor], Manifest]:
    """An adapter and what was added to the base as one plain adapter of higher rank."""
    if not base.terms:
        return dict(params), manifest
    whole = one_adapter(params, manifest.scaling, base)
    scaling = {**manifest.scaling, **dict.fromkeys(lora_modules(params), 1.0)}
    resized = at_ranks(manifest, ranks_in(whole), scaling)
    return whole, replace(resized, entries={n: Entry.of(t) for n, t in sorted(whole.items())})


def _resized(entries: Mapping[str, Entry], ranks: Mapping[str, int]) -> dict[str, Entry]:
    resized = dict(entries)
    for name, module in lora_modules(entries).items():
        if name not in ranks:
            continue
        if module.a in entries:
            shape, dtype = entries[module.a]
            resized[module.a] = Entry((ranks[name], *shape[1:]), dtype)
        if module.b in entries:
            shape, dtype = entries[module.b]
            resized[module.b] = Entry((shape[0], ranks[name], *shape[2:]), dtype)
    return resized


def _config(
    config: Mapping[str, Any], ranks: Mapping[str, int], scaling: Mapping[str, float]
) -> dict[str, Any]:
    """PEFT's options with which every module gets its rank and its scaling."""
    rooted = bool(config.get("use_rslora"))
    alphas = {
        name: scaling.get(name, 1.0) * (math.sqrt(rank) if rooted else rank)
        for name, rank in ranks.items()
    }
    r, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {_pattern(n): rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {_pattern(n): value for n, value in alphas.items() if value != alpha},
    }


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(module: str) -> str:
    """Of this module alone: PEFT matches the end of a name, and one may end like another."""
    return "^" + re.escape(module.removeprefix(WRAPPER))
