"""What a full model needs beside its weights to be used as its base is: tokenizer and settings.

tokenizer files, chat template     as `save_pretrained` writes them
generation_config.json             stop tokens, sampling
config.json                        `use_cache` and special tokens, before a Trainer changed them
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtune.files import read_object, write_bytes, write_text

__all__ = ["Beside", "beside", "beside_of_base", "put_beside"]

HF_CONFIG, GENERATION = "config.json", "generation_config.json"
# What a Trainer changes in the config of a live model.
RESTORED = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Beside:
    """Files by name, and keys of config.json."""

    files: dict[str, bytes] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def beside(model: Any, tokenizer: Any) -> Beside:
    """Of a live model that no Trainer has touched yet, and whatever can save itself beside it."""
    files: dict[str, bytes] = {}
    if hasattr(tokenizer, "save_pretrained"):
        with TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            files = {p.name: p.read_bytes() for p in Path(directory).iterdir() if p.is_file()}
    generation = getattr(model, "generation_config", None)
    if generation is not None:  # a classifier has none; `save_pretrained` would refuse what loads
        files[GENERATION] = generation.to_json_string().encode()
    live = model.config.to_dict()
    return Beside(files, {key: live[key] for key in RESTORED if key in live})


def beside_of_base(model_name_or_path: str) -> Beside:
    """The same of a base model on disk, whose weights are not read.

    Raises:
        ConfigError: no such model, or one without a tokenizer.
    """
    from types import SimpleNamespace

    from transformers import GenerationConfig

    from fedtune.adapters.build import load_config

    config, tokenizer = load_config(model_name_or_path)
    try:
        generation = GenerationConfig.from_pretrained(model_name_or_path)
    except OSError:
        generation = None
    return beside(SimpleNamespace(config=config, generation_config=generation), tokenizer)


def put_beside(directory: Path, found: Beside) -> None:
    """Write it into a full model's directory, over what is there."""
    config = read_object(directory / HF_CONFIG, "Export the model again.")
    text = json.dumps({**config, **found.config}, indent=2, sort_keys=True) + "\n"
    write_text(directory / HF_CONFIG, text)
    for name, data in found.files.items():
        write_bytes(directory / name, data)
