"""A damaged file of the user's is refused in one line, or read as what it has become."""

from __future__ import annotations

import contextlib
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from fedtune.adapters import (
    collect,
    collect_static,
    describe,
    export_adapter,
    load_base,
    load_exported,
    load_init_adapter,
    merge,
    params_from_peft_dir,
)
from fedtune.client.checkpoints import Mark, find_checkpoint, mark_checkpoint
from fedtune.config import ModelArguments
from fedtune.deploy.certs import make_certs
from fedtune.deploy.roles import ca_certificate, server_folder, site_folder
from fedtune.errors import ConfigError, FedtuneError, ManifestError
from fedtune.files import read_object, write_json
from fedtune.report import load_rounds, load_summary
from fedtune.server.checkpoint import ServerState, load_latest, save
from fedtune.settings.yaml_config import load_yaml
from tests.adapters.variants import lora
from tests.report.made_up import made_up_rounds, made_up_summary, write_run
from tests.tiny import tiny_llama, tiny_tokenizer

DAMAGES = 32  # of each file; what was found by hand took fewer than ten
LIVE = get_peft_model(tiny_llama(), lora())
FULL = tiny_llama()
MARK = Mark("run", "a", 3, 2, 1, 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every kind of directory, undamaged."""
    root = tmp_path_factory.mktemp("whole")
    base = root / "base"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer(eos_token="</s>", unk_token="<unk>").save_pretrained(base)
    described = collect(LIVE), collect_static(LIVE), describe(LIVE)
    LIVE.peft_config["default"].base_model_name_or_path = str(base)
    manifest = replace(describe(LIVE), adapter_config=named_base(base))
    export_adapter(root / "adapter", collect(LIVE), {}, manifest)
    LIVE.save_pretrained(root / "peft")
    export_adapter(root / "model", collect(FULL), {}, describe(FULL))
    named = {"weight_map": dict.fromkeys(collect(FULL), "model.safetensors")}
    write_json(root / "model" / "model.safetensors.index.json", named)
    params, static, manifest = described
    save(root / "checkpoints", ServerState(1, params, static, manifest, history=[{"round": 0}]))
    summary = made_up_summary()
    write_run(root / "run", summary, made_up_rounds(summary))
    make_certs(root / "certs", ["a"])
    (root / "checkpoint-2").mkdir()
    mark_checkpoint(root / "checkpoint-2", MARK)
    (root / "run.yaml").write_text("num_rounds: 3\nlearning_rate: 5e-3\nday: 2024-11-30\n")
    write_json(root / "submission.json", {"run": "r", "track": []})
    return root


def named_base(base: Path) -> dict[str, Any]:
    return {**describe(LIVE).adapter_config, "base_model_name_or_path": str(base)}


def merged(directory: Path) -> None:
    merge(directory, directory.with_name("merged"))
    shutil.rmtree(directory.with_name("merged"))


def base(directory: Path) -> None:
    load_base(ModelArguments(model_name_or_path=str(directory)), task="causal_lm")


# A file of `whole` -> what reads it, given its directory.
READERS: dict[str, Callable[[Path], Any]] = {
    "adapter/fedtune_manifest.json": lambda d: load_init_adapter(d, describe(LIVE)),
    "adapter/fedtune_params.safetensors": load_exported,
    "peft/adapter_config.json": lambda d: params_from_peft_dir(d, describe(LIVE)),
    "peft/adapter_model.safetensors": lambda d: load_init_adapter(d, describe(LIVE)),
    "adapter/adapter_config.json": merged,
    "model/model.safetensors.index.json": load_exported,
    "base/config.json": base,
    "base/generation_config.json": base,
    "base/tokenizer.json": base,
    "base/tokenizer_config.json": base,
    "base/model.safetensors": base,
    "checkpoints/round-00001/state.json": lambda d: load_latest(d.parent),
    "checkpoints/round-00001/manifest.json": lambda d: load_latest(d.parent),
    "checkpoints/round-00001/params.safetensors": lambda d: load_latest(d.parent),
    "run/summary.json": load_summary,
    "run/rounds.jsonl": load_rounds,
    "certs/server/server.crt": lambda d: server_folder(d).hosts,
    "certs/server/server.key": server_folder,
    "certs/server/ca.crt": server_folder,
    "certs/submit/ca.crt": ca_certificate,
    "certs/a/site.key": site_folder,
    "certs/a/site.pub": site_folder,
    "checkpoint-2/fedtune_state.json": lambda d: find_checkpoint(d.parent, MARK),
    "run.yaml": lambda d: load_yaml(d / "run.yaml"),
    "submission.json": lambda d: read_object(d / "submission.json", "Make it again."),
}
SLOW = ("base/", "adapter/adapter_config.json")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One to three bytes changed, dropped or added, or the end cut off; most often in the head."""
    if chance.random() < 0.1:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(min(len(changed), 4096))
        byte = chance.choice([chance.randrange(256), ord('"'), ord("0"), 0, 0xFF, ord("-")])
        changed[at : at + chance.choice([0, 1, 1])] = bytes([byte] * chance.choice([0, 1, 1]))
    return bytes(changed)


@pytest.mark.parametrize("name", READERS)
def test_random_damage_ends_in_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    top = name.split("/")[0]
    copy = shutil.copytree if (whole / top).is_dir() else shutil.copy
    copy(whole / top, tmp_path / top)
    file, read = tmp_path / name, READERS[name]
    data, chance, refused = file.read_bytes(), random.Random(name), []
    read(file.parent)  # whole, it can be read
    for _ in range(DAMAGES // 4 if name.startswith(SLOW) else DAMAGES):
        file.write_bytes(damaged(data, chance))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with contextlib.redirect_stdout(None):
                    read(file.parent)
            except FedtuneError as error:
                refused.append(str(error))
    assert not any("\n" in line for line in refused)
    if name not in ("checkpoint-2/fedtune_state.json", "base/generation_config.json"):
        assert refused


NOT_TEXT = b'{"adapter_config": {"peft_type": "L\x8aRA"}}'


def test_bad_utf_8_is_refused_as_bad_json_is(tmp_path: Path) -> None:
    (tmp_path / "fedtune_manifest.json").write_bytes(NOT_TEXT)
    for read in (load_exported, lambda d: load_init_adapter(d, describe(LIVE))):
        with pytest.raises(ManifestError, match=r"fedtune_manifest.json: expected .* in UTF-8"):
            read(tmp_path)
    (tmp_path / "fedtune_manifest.json").unlink()
    (tmp_path / "adapter_config.json").write_bytes(NOT_TEXT)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"adapter_config.json: expected JSON in UTF-8"):
        params_from_peft_dir(tmp_path, describe(LIVE))
    with pytest.raises(ConfigError, match=r"adapter_config.json: expected JSON in UTF-8"):
        merge(tmp_path, tmp_path / "merged")


@pytest.mark.parametrize("text", ["[]", "3", "", "[" * 100_000, '{"a": NaN'])
def test_json_that_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x.json: expected .* Make it again.") as caught:
        read_object(tmp_path / "x.json", "Make it again.")
    assert "\n" not in str(caught.value)


def test_a_date_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("day: 2024-13-30\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_yaml(tmp_path / "run.yaml")
