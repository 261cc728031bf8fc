"""Write and read adapters on disk, from parameters and manifest alone: no base model is needed.

    adapter_config.json, adapter_model.safetensors       what PeftModel.from_pretrained loads
    config.json, model*.safetensors (+ index)            the same for a full model
    fedtune_manifest.json, fedtune_params.safetensors    all that is trained, to continue from

PEFT's file is not enough to continue: for p-tuning and prefix projection it holds the computed
prompt, not the encoder. A full model's own file holds everything, so it is not written twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtune.adapters.beside import Beside, put_beside
from fedtune.adapters.manifest import FULL, Manifest, Params, check
from fedtune.adapters.prompts import PROMPT_KEY, is_prompt, prompt_embeddings, prompt_params
from fedtune.errors import ConfigError, ManifestError
from fedtune.files import read_object, replace_directory, write_text

__all__ = ["export_adapter", "load_exported", "load_init_adapter", "params_from_peft_dir"]

MANIFEST = "fedtune_manifest.json"
CLIENTS = "clients"
PARAMS = "fedtune_params.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
HF_CONFIG = "config.json"
HF_INDEX = "model.safetensors.index.json"
NOTHING = Beside()
AGAIN = "Copy or export it again."

# Options that change what the same tensors compute.
DECISIVE = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "fan_in_fan_out",
)


def export_adapter(
    directory: Path | str,
    params: Params,
    static: Params,
    manifest: Manifest,
    *,
    clients: Mapping[str, Params] | None = None,
    beside: Beside = NOTHING,
) -> None:
    """Replace `directory` by a checkpoint that `from_pretrained` loads and fedtune can continue.

    `clients`: parameters of those that have an adapter of their own, written to `clients/<name>`.
    `beside`: what a full model needs to be used as its base is; an adapter has it at its base.

    Raises:
        ManifestError: the parameters are not those of the manifest.
        ConfigError: `directory` holds something that is no checkpoint, so it is not replaced.
    """
    own = clients or {}
    for tensors in (params, *own.values()):
        check(tensors, manifest)
    check(static, manifest, static=True)
    directory = Path(directory)
    _refuse_foreign(directory)
    with replace_directory(directory) as fresh:
        _write(fresh, params, static, manifest)
        for name, tensors in own.items():
            (fresh / CLIENTS / name).mkdir(parents=True)
            _write(fresh / CLIENTS / name, tensors, static, manifest)
        if manifest.peft_type == FULL:
            put_beside(fresh, beside)


def _write(directory: Path, params: Params, static: Params, manifest: Manifest) -> None:
    tensors = {**static, **params}
    write_text(directory / MANIFEST, manifest.to_json() + "\n")
    if manifest.peft_type == FULL:
        _write_json(directory / HF_CONFIG, manifest.config)
        save_torch_state_dict(tensors, directory, metadata={"format": "pt"})
    else:
        config = {**manifest.adapter_config, "inference_mode": True}
        _write_json(directory / PEFT_CONFIG, config)
        state = peft_state(params, static, manifest)
        save_file(state, directory / PEFT_WEIGHTS, metadata={"format": "pt"})
        save_file(tensors, directory / PARAMS, metadata={"format": "pt"})


def peft_state(params: Params, static: Params, manifest: Manifest) -> Params:
    """The tensors of PEFT's checkpoint under PEFT's keys. No tensor is shared between keys."""
    tensors = {**static, **params}
    state = {key: tensors[name].clone() for key, name in manifest.export.items()}
    if is_prompt(manifest):
        state[PROMPT_KEY] = prompt_embeddings(params, manifest)
    return state


def load_exported(directory: Path | str) -> tuple[Params, Params, Manifest]:
    """Parameters, static tensors and manifest that `export_adapter` wrote; checked.

    Raises:
        ConfigError: not a directory that fedtune exported.
        ManifestError: the tensors are not those of the manifest.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        raise ConfigError(
            f"{directory}: expected a directory that fedtune exported, received one without "
            f"{MANIFEST}. Give the adapter/ or model/ folder of a run."
        )
    manifest = Manifest.read(directory / MANIFEST)
    tensors: Params = {}
    for file in _weight_files(directory, manifest):
        tensors.update(_read(file))
    static = {name: tensors.pop(name) for name in manifest.static if name in tensors}
    params = {name: tensors[name] for name in sorted(tensors)}
    check(params, manifest)
    check(static, manifest, static=True)
    return params, static, manifest


def load_init_adapter(directory: Path | str, manifest: Manifest) -> tuple[Params, Params]:
    """`--init_adapter`: parameters and static tensors for the described model.

    Reads fedtune's own export, or a plain PEFT checkpoint where that can be continued.

    Raises:
        ConfigError: the directory holds neither.
        ManifestError: it holds another adapter than the manifest describes.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return params_from_peft_dir(directory, manifest)
    params, static, found = load_exported(directory)
    _refuse_other_config(directory, found.adapter_config, manifest)
    tensors = {**static, **params}  # a method may have frozen what is trained here, or the opposite
    static = {name: tensors.pop(name) for name in manifest.static if name in tensors}
    check(tensors, manifest)
    check(static, manifest, static=True)
    return {name: tensors[name] for name in sorted(tensors)}, static


def params_from_peft_dir(directory: Path | str, manifest: Manifest) -> tuple[Params, Params]:
    """Parameters and static tensors from a plain PEFT checkpoint, for a described model.

    Floating-point tensors are cast to the manifest's dtypes.

    Raises:
        ConfigError: no PEFT checkpoint in safetensors.
        ManifestError: another adapter, or one that cannot be continued (a computed prompt).
    """
    directory = Path(directory)
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (directory / name).is_file():
            raise ConfigError(
                f"{directory}: expected an adapter, received a path without {name}. Give a "
                "directory that fedtune or PEFT's save_pretrained (safetensors) wrote."
            )
    config = read_object(directory / PEFT_CONFIG, AGAIN)
    _refuse_other_config(directory, config, manifest)
    state = _read(directory / PEFT_WEIGHTS)
    found = prompt_params(state.pop(PROMPT_KEY), manifest) if PROMPT_KEY in state else {}
    for key in sorted(state):
        # PEFT copies a targeted embedding's frozen base weight; the base model has it already.
        if key in manifest.export or not key.endswith(".base_layer.weight"):
            found[manifest.export.get(key, key)] = state[key]
    expected = {**manifest.entries, **manifest.static}
    for name, tensor in found.items():
        entry = expected.get(name)
        if entry is not None and tensor.is_floating_point():
            found[name] = tensor.to(_dtype(entry.dtype))
    static = {name: found.pop(name) for name in manifest.static if name in found}
    check(found, manifest)
    check(static, manifest, static=True)
    return {name: found[name] for name in sorted(found)}, static


def _read(file: Path) -> Params:
    try:
        tensors: Params = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{file}: expected a safetensors file, received one that cannot be read ({error}); "
            "copy or export it again."
        ) from None
    return tensors


def _weight_files(directory: Path, manifest: Manifest) -> list[Path]:
    if manifest.peft_type != FULL:
        return [directory / PARAMS]
    if not (directory / HF_INDEX).is_file():
        return [directory / "model.safetensors"]
    named = read_object(directory / HF_INDEX, AGAIN).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ConfigError(
            f"{directory / HF_INDEX}: expected a weight_map of file names, received none. {AGAIN}"
        )
    return [directory / Path(file).name for file in sorted(set(named.values()))]


def _refuse_foreign(directory: Path) -> None:
    """The directory is replaced as a whole, so it has to be new, empty or a checkpoint."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not any((directory / name).is_file() for name in (MANIFEST, PEFT_CONFIG)):
        raise ConfigError(
            f"{directory}: expected a new or empty directory or an adapter to replace, received "
            "one with other files. Give another path."
        )


def _refuse_other_config(directory: Path, found: Mapping[str, Any], manifest: Manifest) -> None:
    expected = manifest.adapter_config
    for key in DECISIVE:
        if (found.get(key) or None) != (expected.get(key) or None):
            raise ManifestError(
                f"{directory}: `{key}` differs: expected {expected.get(key)!r} (this run), "
                f"received {found.get(key)!r}. Use the adapter settings it was trained with."
            )


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
