"""What a run reads, by content: sha256 of every file, and the revision of what is of the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedtune.config import Arguments
from fedtune.files import sha256

__all__ = ["Sources", "sources_of"]


@dataclass(frozen=True)
class Sources:
    """Names as they were given, to a hash.

    Attributes:
        data: rows, models and adapters: a run goes on with the same ones alone.
        code: the recipe and its YAML. Settings are compared one by one, so that a comment may
            change, and what a recipe does cannot be told from its text.
    """

    data: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, str]:
        """Both."""
        return {**self.data, **self.code}


def sources_of(args: Arguments) -> Sources:
    """Read what the flags name once; what is not there is for others to refuse."""
    data: dict[str, str] = {}
    for name in (args.data.train_file, args.data.eval_file):
        data |= _of_path(name)
    data |= _of_path(args.model.model_name_or_path) or _of_model(args.model.model_name_or_path)
    data |= _of_path(args.adapter.init_adapter)
    data |= _of_path(args.data.dataset_name, below="**/*") or _of_dataset(args.data.dataset_name)
    data |= _inside_the_package(args)
    code = {**_of_path(args.run.config), **_of_path(args.command[1] if args.command else None)}
    return Sources(data, code)


def _of_path(name: str | None, *, below: str = "*") -> dict[str, str]:
    """The file of that name, or those of a directory."""
    if name is None:
        return {}
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob(below)) if path.is_dir() else []
    return {str(file): sha256(file) for file in files if file.is_file() and file.name[0] != "."}


def _inside_the_package(args: Arguments) -> dict[str, str]:
    """The corpus and the model that stand in where none is named."""
    from fedtune.assets import CORPUS_FILE, MODEL_DIR

    found: dict[str, str] = {}
    if args.data.train_file is None and args.data.dataset_name is None:
        found |= _of_path(str(CORPUS_FILE))
    if args.model.model_name_or_path is None:
        found |= _of_path(str(MODEL_DIR))
    home = MODEL_DIR.parent
    return {f"fedtune/assets/{Path(name).relative_to(home)}": sha for name, sha in found.items()}


def _of_model(name: str | None) -> dict[str, str]:
    """A model of the hub by its revision, where it is known here."""
    if name is None:
        return {}
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        return {}
    return {} if file is None else {name: Path(file).parent.name}


def _of_dataset(name: str | None) -> dict[str, str]:
    """A data set of the hub by the fingerprint that `datasets` gives its files."""
    if name is None:
        return {}
    from datasets import load_dataset_builder

    from fedtune.data.row_files import quiet

    try:
        with quiet():
            builder = load_dataset_builder(name)
    except Exception:  # the hub client raises many kinds; reading the rows says it in one line
        return {}
    return {name: str(builder.hash)}
