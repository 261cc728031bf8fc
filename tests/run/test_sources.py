"""What a run reads, by content."""

import hashlib

from datasets import Dataset
from trl import SFTConfig

from fedtune.run.sources import sources_of
from fedtune.settings import parse_arguments


def sources(*flags):
    return sources_of(parse_arguments(SFTConfig, [*map(str, flags)]))


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_that_the_flags_name(tmp_path):
    files = [tmp_path / name for name in ("train.csv", "eval.csv", "c.yaml")]
    folders = [tmp_path / name for name in ("model", "adapter")]
    for folder in folders:
        (folder / "checkpoint-1").mkdir(parents=True)
        files += [folder / "config.json", folder / "model.safetensors"]
        (folder / ".cache").write_text("x")
        (folder / "checkpoint-1" / "optimizer.pt").write_text("x")
    for number, file in enumerate(files):
        file.write_text(f"lora_r: {number + 1}\n")
    found = sources(
        *("--train_file", files[0], "--eval_file", files[1], "--config", files[2]),
        *("--model_name_or_path", folders[0], "--init_adapter", folders[1]),
    )
    assert found.all == {str(file): sha(file) for file in files}
    assert found.code == {str(files[2]): sha(files[2])}


def test_what_is_not_there_is_for_others_to_refuse(tmp_path):
    assert (
        sources("--train_file", tmp_path / "no.csv", "--model_name_or_path", "no/model").data == {}
    )


def test_what_stands_in_where_nothing_is_named():
    found = sources().data
    assert "fedtune/assets/silos.jsonl" in found
    assert "fedtune/assets/tiny_llm/model.safetensors" in found


def test_a_data_set_in_a_directory_is_its_files(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    file = tmp_path / "set" / "data" / "train.parquet"
    Dataset.from_dict({"text": ["a"]}).to_parquet(file)
    found = sources("--dataset_name", tmp_path / "set", "--model_name_or_path", tmp_path)
    assert found.data == {str(file): sha(file)}
