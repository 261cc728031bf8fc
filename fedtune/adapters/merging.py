"""Fold an exported adapter into its base model: an ordinary model that needs no PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from fedtune.adapters.build import DAMAGED, Task, load_base
from fedtune.adapters.export import AGAIN, MANIFEST, PEFT_CONFIG, PEFT_WEIGHTS
from fedtune.adapters.manifest import Manifest
from fedtune.config import ModelArguments
from fedtune.errors import ConfigError
from fedtune.files import read_object, replace_directory

__all__ = ["merge"]


def merge(
    directory: Path | str, output_dir: Path | str, model_name_or_path: str | None = None
) -> None:
    """Write base model + adapter as one HuggingFace model, with its tokenizer, to `output_dir`.

    The base model is the one the adapter names unless `model_name_or_path` is given; it is loaded
    without quantization.

    Raises:
        ConfigError: no adapter, a prompt method (nothing to merge into), no base model, or an
            `output_dir` that has files.
    """
    directory, output_dir = Path(directory), Path(output_dir)
    config = _read_config(directory)
    base_path = model_name_or_path or config.base_model_name_or_path
    if not base_path:
        raise ConfigError(
            f"{directory}: expected the base model's path in {PEFT_CONFIG}, received none. "
            "Pass model_name_or_path."
        )
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError(
            f"{output_dir}: expected a new or empty directory, received one with files. "
            "Give another path."
        )
    task: Task = "seq_cls" if config.task_type == "SEQ_CLS" else "causal_lm"
    labels = _id2label(directory) if task == "seq_cls" else None
    base, tokenizer = load_base(
        ModelArguments(model_name_or_path=base_path), task=task, id2label=labels
    )
    try:
        _untie_if_adapted(base, directory)
        merged = PeftModel.from_pretrained(base, str(directory)).merge_and_unload()
    except DAMAGED as error:
        raise _no_adapter(directory, error) from None
    with replace_directory(output_dir) as fresh:
        merged.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)


def _read_config(directory: Path) -> PeftConfig:
    if not (directory / PEFT_CONFIG).is_file():
        full = (directory / "config.json").is_file()
        raise ConfigError(
            f"{directory}: expected an adapter with {PEFT_CONFIG}, received "
            + ("a full model. It needs no merge." if full else "none. Give an adapter directory.")
        )
    read_object(directory / PEFT_CONFIG, AGAIN)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(directory))
    except DAMAGED as error:
        raise _no_adapter(directory, error) from None
    if config.is_prompt_learning:
        kind = PeftType(config.peft_type).value
        raise ConfigError(
            f"{directory}: expected an adapter that changes weights, received {kind}: a prompt is "
            "input to the model and cannot be merged. Load it with PeftModel.from_pretrained."
        )
    return config


def _no_adapter(directory: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{directory}: expected an adapter of this base model, received one that does not load "
        f"({' '.join(str(error).split())[:300]}). {AGAIN}"
    )


def _id2label(directory: Path) -> dict[int, str] | None:
    """Class names as the trained model had them; from fedtune's manifest."""
    if not (directory / MANIFEST).is_file():
        return None
    manifest = Manifest.read(directory / MANIFEST)
    return {int(i): label for i, label in manifest.config.get("id2label", {}).items()} or None


def _untie_if_adapted(base: PreTrainedModel, directory: Path) -> None:
    """Give the output layer its own weight where the adapter changes only one of a tied pair.

    Merging into a shared weight would change the other layer too.
    """
    out: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    into: Any = base.get_input_embeddings()
    if out is None or out.weight is not into.weight:
        return
    paths = [path for path, module in base.named_modules() if module in (out, into)]
    with safe_open(directory / PEFT_WEIGHTS, framework="pt") as weights:
        adapted = any(f".{path}." in key for key in weights.keys() for path in paths)  # noqa: SIM118
    if adapted:
        out.weight = nn.Parameter(out.weight.detach().clone())
        base.config.tie_word_embeddings = False
