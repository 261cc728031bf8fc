"""The manifest: what an adapter is, so that two sites can tell whether they train the same one.

It travels as JSON beside the parameters and holds all the server knows: the server has no base
model. Sites agree when the hashes agree.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ManifestError

__all__ = ["FULL", "Entry", "Manifest", "Params", "check"]

Params = dict[str, Tensor]  # canonical name -> tensor on the CPU

# After a module's name: the factors of what has been added to its frozen weight.
TERM_B, TERM_A = ".base_B", ".base_A"
FULL = "FULL"  # peft_type of a model that is trained without an adapter
VERSION = 1
DIGITS = 12  # of a scaling that count: alpha / sqrt(r) times sqrt(r) is alpha up to rounding

# Keys of a PEFT config that differ between sites without changing what is trained; dropout is a
# setting of the training, as the learning rate is: the adapter computes the same.
SITE_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "encoder_dropout",
        "inference_mode",
        "lora_dropout",
        "module_dropout",
        "peft_version",
        "rank_dropout",
        "revision",
    }
)
# Said by shapes and scaling already, layer by layer.
RANK_KEYS = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})


class Entry(NamedTuple):
    """Shape and dtype of one tensor; the dtype as text without `torch.`."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """The entry that describes `tensor`."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Manifest:
    """Everything the server knows of an adapter. Made by `describe`.

    Attributes:
        peft_type: PEFT's name of the method, or `FULL`.
        base_hash: hash of the base model's config, without what may differ between sites.
        adapter_config: PEFT's config as JSON; empty for a full model.
        entries: canonical name -> shape and dtype of a trained tensor.
        static: the same for frozen tensors that are sent once.
        scaling: module -> factor of B @ A (LoRA kinds only).
        export: key in PEFT's checkpoint -> canonical name. Several keys may share a tied tensor.
        config: the base model's config as JSON.
    """

    peft_type: str
    base_hash: str
    adapter_config: dict[str, Any]
    entries: dict[str, Entry]
    static: dict[str, Entry] = field(default_factory=dict)
    scaling: dict[str, float] = field(default_factory=dict)
    export: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """sha256 (hex) of what has to be equal at every site: paths and versions are left out.

        Unset options are left out too, so that a PEFT release that adds one does not split sites.
        """
        left_out = SITE_KEYS | (RANK_KEYS if self.scaling else frozenset())
        config = {k: v for k, v in self.adapter_config.items() if v and k not in left_out}
        scaling = {name: f"{value:.{DIGITS}g}" for name, value in self.scaling.items()}
        return digest([self.peft_type, self.base_hash, config, self.entries, self.static, scaling])

    @property
    def bytes(self) -> int:
        """Of all trained tensors together."""
        return sum(entry.bytes for entry in self.entries.values())

    def frozen(self, names: Iterable[str]) -> Manifest:
        """The same adapter with these tensors sent once instead of trained; others are ignored."""
        moved = {name: self.entries[name] for name in names if name in self.entries}
        if not moved:
            return self
        trained = {name: entry for name, entry in self.entries.items() if name not in moved}
        static = dict(sorted({**self.static, **moved}.items()))
        return replace(self, entries=trained, static=static)

    def objection_to(self, built: Manifest) -> str:
        """Why `built` is not this adapter, in one line; empty when it is."""
        if built.hash == self.hash:
            return ""
        differences = (row for row in self._compared(built) if row[1] != row[2])
        what, ours, theirs = next(differences, ("hash", self.hash[:12], built.hash[:12]))
        advice = "use the same model and adapter settings everywhere"
        if what in RANK_KEYS - {"r"}:
            root = "sqrt(r)" if self.adapter_config.get("use_rslora") else "r"
            advice = f"set {what} so that lora_alpha / {root} is the same everywhere"
        return (
            f"this client's adapter differs from the global one: expected {what} {ours}, built "
            f"{theirs}; {advice}."
        )

    def _compared(self, built: Manifest) -> Iterator[tuple[str, Any, Any]]:
        """What can differ, from the general to the particular, in words."""
        yield "base model", self.base_hash[:12], built.base_hash[:12]
        yield "peft_type", self.peft_type, built.peft_type
        keys = {*self.adapter_config, *built.adapter_config} - SITE_KEYS
        # The last ones may differ in adapters that are equal; alpha goes with r.
        for key in sorted(keys, key=lambda key: (key in RANK_KEYS, key != "r", key)):
            ours, theirs = self.adapter_config.get(key), built.adapter_config.get(key)
            if (ours or None) != (theirs or None):  # 0, empty and not set are one
                yield key, "unset" if ours is None else ours, "unset" if theirs is None else theirs
        for name in sorted({*self.entries, *built.entries, *self.static, *built.static}):
            mine, other = self.entries.get(name), built.entries.get(name)
            yield name, mine or self.static.get(name), other or built.static.get(name)
        yield "scaling", self.scaling, built.scaling

    def to_json(self) -> str:
        """JSON text, keys sorted."""
        return json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            ManifestError: no manifest, or one of another version.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            if version != VERSION:
                raise ManifestError(
                    f"Manifest version: expected {VERSION}, received {version!r}. "
                    "Use the same fedtune release everywhere."
                )
            manifest = cls(**{**data, **{k: _entries(data[k]) for k in ("entries", "static")}})
            _check_types(manifest)
            return manifest
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(
                f"Manifest: expected fedtune's JSON, received something else ({error!r}). "
                "Read it from fedtune_manifest.json."
            ) from None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """`from_json` of a file.

        Raises:
            ManifestError: it cannot be read, or holds no manifest.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(
                f"{path}: expected fedtune's JSON in UTF-8, received a file that cannot be read "
                f"({error}). Copy or export it again."
            ) from None
        return cls.from_json(text)


def digest(value: object) -> str:
    """sha256 (hex) of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check(params: Mapping[str, Tensor], manifest: Manifest, *, static: bool = False) -> None:
    """Refuse parameters that are not exactly those of the manifest.

    Raises:
        ManifestError: names the first offending key in sorted order: missing, extra, wrong shape,
            wrong dtype, NaN or Inf.
    """
    expected = manifest.static if static else manifest.entries
    for name in sorted({*expected, *params}):
        if name not in params:
            raise ManifestError(
                f"`{name}` is missing: expected {expected[name]}, received {len(params)} of "
                f"{len(expected)} tensors without it. Send all that `collect` returns."
            )
        if name not in expected:
            raise ManifestError(
                f"`{name}` is unknown: expected only the {len(expected)} tensors of this "
                f"{manifest.peft_type} manifest, received one more. Use the adapter settings of "
                "the other sites."
            )
        _check_tensor(name, params[name], expected[name])


def _check_tensor(name: str, tensor: Tensor, expected: Entry) -> None:
    received = Entry.of(tensor)
    if received.shape != expected.shape:
        raise ManifestError(
            f"`{name}` has the wrong shape: expected {list(expected.shape)}, received "
            f"{list(received.shape)}. Use the adapter settings (rank, modules) of the other sites."
        )
    if received.dtype != expected.dtype:
        raise ManifestError(
            f"`{name}` has the wrong dtype: expected {expected.dtype}, received {received.dtype}. "
            f"Cast it with `.to(torch.{expected.dtype})`."
        )
    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad:
        raise ManifestError(
            f"`{name}` is not finite: expected numbers, received {bad} NaN or Inf of "
            f"{tensor.numel()}. Lower the learning rate or clip gradients."
        )


def _check_types(manifest: Manifest) -> None:
    """Raise TypeError where a field is of another type than `to_json` writes."""
    texts = (manifest.peft_type, manifest.base_hash, *manifest.export, *manifest.export.values())
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name is no text")
    if not all(isinstance(part, dict) for part in (manifest.adapter_config, manifest.config)):
        raise TypeError("a config is no object")
    for entry in (*manifest.entries.values(), *manifest.static.values()):
        if not isinstance(entry.dtype, str) or not all(type(size) is int for size in entry.shape):
            raise TypeError("a shape is not of whole numbers, or a dtype no text")
    for factor in manifest.scaling.values():
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            raise TypeError("a scaling is no number")


def _entries(data: Mapping[str, Any]) -> dict[str, Entry]:
    return {name: Entry(tuple(shape), dtype) for name, (shape, dtype) in data.items()}
