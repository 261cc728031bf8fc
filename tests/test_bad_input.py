"""What cannot work ends before training: one line, status 2, and the disk as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import Trainer

from fedtune.settings.hf_settings import OWNED
from tests.recipes.runs import TINY, recipe, run_cli, run_here, tree
from tests.tiny import tiny_llama, tiny_tokenizer

LORA, PTUNING, SEQ_CLS = recipe("lora_sft"), recipe("ptuning_sentiment"), recipe("seq_cls_lora")

ROWS = [
    {"instruction": f"Say w{i % 9}.", "output": "w5", "site": "abc"[i % 3], "label": "xy"[i % 2]}
    for i in range(12)
]


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    def train(*_args, **_kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr(Trainer, "train", train)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory of a run, with good and bad inputs in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", ROWS)
    write(tmp_path / "long.jsonl", [*ROWS, {**ROWS[0], "output": "word " * 400}])
    write(tmp_path / "no_columns.jsonl", [{"a": 1, "b": 2}] * 12)
    write(tmp_path / "no_label.jsonl", [{"text": "hello there"}] * 12)
    write(tmp_path / "new_label.jsonl", [{**ROWS[0], "label": "z"}] * 4)
    write(tmp_path / "no_answer.jsonl", [{**ROWS[0], "output": None}] * 12)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "torn.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    (tmp_path / "rows.txt").write_text("hello\n")
    (tmp_path / "plain.yaml").touch()
    (tmp_path / "unknown_key.yaml").write_text("lora_rr: 4\n")
    (tmp_path / "owned_key.yaml").write_text("max_steps: 4\n")
    (tmp_path / "wrong_type.yaml").write_text("lora_r: eight\n")
    (tmp_path / "wrong_choice.yaml").write_text("partition: idd\n")
    (tmp_path / "twice.yaml").write_text("lora_r: 4\nlora_r: 8\n")
    (tmp_path / "broken.yaml").write_text("lora_r: [4\n")
    (tmp_path / "list.yaml").write_text("- lora_r\n")
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    (tmp_path / "no_adapter").mkdir()
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def assert_refused(done, *expected):
    """One line that starts with `error:`, says each of `expected`, and ends a sentence."""
    assert done.status == 2, done
    assert len(done.errors) == 1, done.err
    (line,) = done.errors
    assert line.startswith("error: ")
    assert "Traceback" not in done.err
    for text in expected:
        assert text.lower() in line.lower(), line
    assert len(line) < 500
    return line


def refused(place, script, flags, *expected):
    """Run in this process with --output_dir out; everything below `place` stays as it was."""
    given = [*TINY, "--output_dir", "out", *(flags.split() if isinstance(flags, str) else flags)]
    before = tree(place)
    line = assert_refused(run_here(script, *given), *expected)
    assert tree(place) == before
    return line


SETTINGS = {
    "unknown flag": ("--num_round 3", "unknown flag --num_round", "did you mean --num_rounds?"),
    "abbreviation": ("--num_cl 3", "unknown flag --num_cl", "--num_clients"),
    "stray word": ("3", "unexpected argument '3'", "--name value"),
    "not a number": ("--lora_r eight", "--lora_r", "expected a whole number", "received 'eight'"),
    "not a flag's type": (
        "--eval_fraction much",
        "--eval_fraction",
        "expected a number",
        "received 'much'",
    ),
    "bad choice": ("--partition idd", "--partition", "'idd'", "did you mean iid?"),
    "bad engine": ("--engine rey", "--engine", "'rey'", "did you mean ray?"),
    "out of range": ("--num_rounds 0", "--num_rounds", ">= 1", "received 0"),
    "not finite": ("--learning_rate nan", "--learning_rate", ">= 0", "received nan"),
    "both budgets": ("--steps_per_round 2 --epochs_per_round 1", "Keep one of them"),
    "seed and seeds": ("--seed 1 --seeds 1,2", "--seed and --seeds", "Keep --seeds"),
    "seeds that are words": ("--seeds one", "--seeds", "whole numbers", "'one'", "1,2,3"),
    "a seed twice": ("--seeds 1,1", "--seeds", "1 is given twice"),
    "both sources": ("--train_file good.jsonl --dataset_name x/y", "Keep one of them"),
    "column without name": ("--config plain.yaml --partition column", "--partition_column NAME"),
    "column without effect": ("--partition_column silo", "has no effect", "--partition column"),
    "both quantizations": ("--load_in_4bit --load_in_8bit", "Keep one of them"),
    "4bit without adapter": ("--load_in_4bit --peft_method none", "--load_in_4bit", "Use lora"),
    "option of another adapter": ("--use_rslora --peft_method ia3", "--use_rslora", "ia3"),
    "unknown strategy": ("--strategy fedagv", "--strategy", "'fedagv'", "did you mean fedavg?"),
    "setting of no strategy": ("--strategy_args mu=1", "--strategy_args", "'mu'", "leave it out"),
    "no pairs": ("--strategy_args mu", "--strategy_args", "name=number", "'mu'"),
    "ranks of too many": (
        "--strategy flora --client_ranks 4,8,16",
        "--client_ranks",
        "expected 2 whole numbers >= 1, one per client",
        "4,8,16",
    ),
    "a rank of 0": ("--strategy flora --client_ranks 4,0", "--client_ranks", ">= 1", "4,0"),
    "ranks that are words": ("--client_ranks 4,x", "--client_ranks", "'4,x'", "1,2,3"),
    "ranks of no LoRA": ("--peft_method p_tuning --client_ranks 4,4", "--peft_method lora"),
    "mixed ranks of DoRA": (
        "--strategy flexlora --peft_method dora --client_ranks 4,8",
        "expected --peft_method lora, received dora",
    ),
    **{
        f"mixed ranks of {name}": (
            f"--strategy {name} --client_ranks 4,8",
            f"--strategy {name}: it needs equal ranks",
            "Use flora, flexlora, hetlora, raflora.",
        )
        for name in ("fedavg", "ffa_lora", "fedex_lora", "scaffold")
    },
    "mixed ranks with control": (
        "--strategy scaffold+raflora --client_ranks 4,8",
        "Leave one of them out",
    ),
    "unknown arm": ("--compare lokal", "--compare", "'lokal'", "did you mean local?"),
    "all and more": ("--compare all,local", "`all` stands alone"),
    "parity of reset": ("--compare parity --client_state reset", "Use --client_state carry"),
    "unknown tracker": ("--track tensorbord", "'tensorbord'", "did you mean tensorboard?"),
    "too many replies": ("--min_replies 3", "--min_replies", "at most 2", "received 3"),
    "resume and overwrite": ("--resume --overwrite", "one keeps the earlier run, one deletes it"),
    "gpus without ray": ("--gpus_per_client 1", "no effect", "Use --engine ray"),
    "unknown YAML key": ("--config unknown_key.yaml", "`lora_rr`", "did you mean lora_r?"),
    "owned YAML key": ("--config owned_key.yaml", "`max_steps`", "--num_rounds"),
    "wrong YAML type": ("--config wrong_type.yaml", "`lora_r`", "a whole number", "'eight'"),
    "wrong YAML choice": ("--config wrong_choice.yaml", "`partition`", "'idd'", "iid"),
    "YAML key twice": ("--config twice.yaml", "`lora_r` is given twice", "line 2"),
    "broken YAML": ("--config broken.yaml", "broken.yaml is not valid YAML", "line 2", "Correct"),
    "YAML list": ("--config list.yaml", "list.yaml", "`name: value`", "list"),
    "missing YAML": ("--config nowhere.yaml", "--config", "nowhere.yaml", "No such file"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case, place):
    refused(place, LORA, *SETTINGS[case])


@pytest.mark.parametrize("name", sorted(OWNED))
def test_settings_that_the_federation_owns(name, place):
    refused(place, LORA, f"--{name} 1", f"--{name} is decided by fedtune", OWNED[name])


DATA = {
    "missing file": ("--train_file god.jsonl", "--train_file", "no file god.jsonl"),
    "missing eval file": ("--eval_file god.jsonl", "--eval_file", "no file god.jsonl"),
    "a directory": ("--train_file thesis", "--train_file", "thesis"),
    "unknown kind": ("--train_file rows.txt", "--train_file", ".jsonl", "rows.txt"),
    "empty file": ("--train_file empty.jsonl", "empty.jsonl", "at least one row", "none"),
    "torn line": ("--train_file torn.jsonl", "torn.jsonl", "line 2"),
    "no known columns": (
        "--train_file no_columns.jsonl",
        "instruction",
        "'a', 'b'",
        "--text_column",
    ),
    "wrong text column": (
        "--train_file good.jsonl --text_column instructon",
        "--text_column",
        "'instructon'",
        "did you mean --text_column instruction?",
    ),
    "wrong partition column": (
        "--train_file good.jsonl --partition column --partition_column silo",
        "--partition_column",
        "'instruction', 'output', 'site', 'label'",
        "'silo'",
        "--partition iid",
    ),
    "an empty cell": (
        "--train_file no_answer.jsonl",
        "`output`",
        "row 1 (line 1 of no_answer.jsonl) and 11 more rows",
    ),
    "more clients than rows": (
        "--train_file good.jsonl --num_clients 20",
        "--num_clients",
        "11 rows",
        "received 20",
    ),
    "too few rows a client": (
        "--train_file good.jsonl --num_clients 4 --min_rows 4",
        "--min_rows",
        "4 clients x 4 rows",
        "received 11",
    ),
    "too few owners": (
        "--train_file good.jsonl --partition column --partition_column site "
        "--num_clients 4 --min_rows 1",
        "4 distinct values",
        "received 3",
        "--num_clients to 3",
    ),
    "too few rows under dirichlet": (
        "--train_file good.jsonl --partition dirichlet --num_clients 4 --min_rows 4",
        "--min_rows",
        "4 clients x 4 rows",
        "received 11",
    ),
    "one row": ("--max_rows 2 --num_clients 2 --min_rows 1", "--num_clients", "(1 rows)"),
    "too long": ("--train_file long.jsonl --strict_length", "256 tokens", "row", "--strict_length"),
    "prompts take room": (
        "--train_file long.jsonl --strict_length --peft_method p_tuning --num_virtual_tokens 20",
        "236 tokens (the model's context minus 20 virtual tokens)",
    ),
    "max_length above the context": ("--max_length 300", "--max_length", "256", "received 300"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, place):
    refused(place, LORA, *DATA[case])


@pytest.mark.parametrize("script", [PTUNING, SEQ_CLS], ids=lambda path: path.stem)
def test_labels(script, place):
    refused(place, script, "--train_file no_label.jsonl", "label", "--label_column")
    refused(
        place, script, "--train_file good.jsonl --label_column lable", "did you mean --label_column"
    )


@pytest.mark.parametrize("script", [PTUNING, SEQ_CLS], ids=lambda path: path.stem)
def test_one_label_is_refused_before_a_model_is_built(script, place, monkeypatch):
    write(place / "one_label.jsonl", [{**row, "label": "positive"} for row in ROWS])
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    refused(
        place,
        script,
        "--train_file one_label.jsonl",
        "column `label`: expected at least two labels, received `positive` in all 12 rows",
    )


def test_a_label_that_only_the_held_out_rows_have(place):
    flags = "--train_file good.jsonl --eval_file new_label.jsonl"
    refused(
        place,
        SEQ_CLS,
        flags,
        "`label`",
        "x, y",
        "'z'",
        "row 1 (line 1 of new_label.jsonl) and 3 more rows",
    )


def test_a_long_text_and_virtual_tokens(place):
    flags = "--train_file long.jsonl --label_column label --text_column output --strict_length"
    refused(place, PTUNING, flags, "236 tokens", "20 virtual tokens")


MODELS = {
    "no directory": ("--model_name_or_path ./nowhere", "./nowhere", "does not exist"),
    "no model": ("--model_name_or_path thesis", "thesis", "config.json"),
    "an adapter": ("--model_name_or_path adapter", "adapter", "config.json", "received an adapter"),
    "no tokenizer": ("--model_name_or_path headless", "headless", "tokenizer"),
    "no weights": ("--model_name_or_path weightless", "weightless"),
    "no such module": ("--lora_target_modules q_prj", "q_prj", "--lora_target_modules"),
    "no such start": ("--init_adapter nowhere", "--init_adapter", "no directory nowhere"),
    "no adapter there": ("--init_adapter no_adapter", "--init_adapter", "no_adapter", "expected"),
    "adapter of another rank": ("--init_adapter adapter --lora_r 4", "adapter", "`r`", "8", "4"),
    "adapter of another rank than the largest": (
        "--init_adapter adapter --strategy flora --client_ranks 2,4",
        "--init_adapter",
        "`r` differs: expected 4",
        "received 8",
    ),
    "adapter of another kind": (
        "--init_adapter adapter --peft_method ia3",
        "--init_adapter",
        "IA3",
    ),
    "adapter of another model": (
        "--init_adapter adapter --model_name_or_path other",
        "--init_adapter",
    ),
    "a torn adapter": ("--init_adapter torn", "--init_adapter", "torn", "cannot be read"),
}


@pytest.mark.parametrize(
    ("script", "flags"), [(LORA, "--dry_run"), (LORA, ""), (PTUNING, ""), (SEQ_CLS, "")]
)
def test_tokens_beyond_the_embedding(script, flags, place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedtune.assets import MODEL_DIR

    model, tokenizer = (
        auto.from_pretrained(MODEL_DIR) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    size = model.config.vocab_size
    tokenizer.add_tokens(["w7"])
    model.save_pretrained(place / "grown")
    tokenizer.save_pretrained(place / "grown")
    refused(
        place,
        script,
        f"--train_file good.jsonl --model_name_or_path grown {flags}",
        f"the tokenizer has {size + 1:,} tokens, the model {size:,} embeddings; row 8 (line 8 of "
        f"good.jsonl) uses token {size:,} `w7`. Fix: resize the model",
    )


@pytest.fixture
def models(place):
    """An adapter for the embedded model, and models that lack something."""
    from fedtune.adapters import attach_adapter, collect, describe, export_adapter, load_base
    from fedtune.config import AdapterArguments, ModelArguments

    model, _ = load_base(ModelArguments(), task="causal_lm")
    settings = AdapterArguments(lora_target_modules="all-linear")
    peft = attach_adapter(model, settings, "causal_lm", 0)
    export_adapter(place / "adapter", collect(peft), {}, describe(peft))
    shutil.copytree(place / "adapter", place / "torn")
    (place / "torn" / "fedtune_params.safetensors").write_text("version https://git-lfs")
    tiny = tiny_llama()
    tiny.save_pretrained(place / "headless")
    tiny.save_pretrained(place / "other")
    special = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>"}
    tiny_tokenizer(**special).save_pretrained(place / "other")
    shutil.copytree(place / "other", place / "weightless")
    (place / "weightless" / "model.safetensors").unlink()
    return place


@pytest.mark.parametrize("case", MODELS)
def test_models_and_adapters(case, models):
    refused(models, LORA, *MODELS[case])


@pytest.fixture
def used(place):
    """The directory of an earlier run, with settings of its own."""
    directory = place / "out"
    (directory / "adapter").mkdir(parents=True)
    torch.save(torch.zeros(1), directory / "adapter" / "weights")
    (directory / "summary.json").write_text("{}")
    (directory / "run.json").write_text('{"fedtune_run": 1, "settings": {"lora_r": 2}}')
    return place


OUTPUT = {
    "an earlier run": ("", "holds an earlier run", "--resume", "--overwrite"),
    "other settings": ("--resume", "--resume", "received"),
    "bad data, overwrite": ("--overwrite --train_file empty.jsonl", "empty.jsonl"),
    "bad model, overwrite": ("--overwrite --model_name_or_path ./nowhere", "./nowhere"),
    "start that would go": ("--overwrite --init_adapter out/adapter", "--init_adapter", "deletes"),
    "a file": ("--output_dir a_file", "a_file is a file", "Choose a directory"),
    "below a file": ("--output_dir a_file/out", "a_file is a file"),
    "foreign files": ("--output_dir thesis", "thesis is not empty (thesis.tex)"),
    "foreign files, overwrite": ("--output_dir thesis --overwrite", "nothing is deleted"),
    "nothing to resume": ("--output_dir new --resume", "no run to continue in new"),
}


@pytest.mark.parametrize("case", OUTPUT)
def test_output_directories(case, used):
    refused(used, LORA, *OUTPUT[case])


def test_a_directory_without_permission(place, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    refused(place, LORA, "--output_dir new", "cannot write new", "permission")


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (LORA, "--num_round 3", "did you mean --num_rounds?"),
        (PTUNING, "--train_file no_label.jsonl", "--label_column"),
        (SEQ_CLS, "--model_name_or_path ./nowhere", "./nowhere"),
    ],
    ids=["flag", "data", "model"],
)
def test_a_process_of_its_own(script, flags, expected, place):
    before = tree(place)
    done = run_cli(script, *TINY, "--output_dir", "out", *flags.split(), cwd=place)
    assert_refused(done, expected)
    assert done.out == ""
    assert tree(place) == before
