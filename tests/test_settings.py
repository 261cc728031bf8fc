import warnings
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from fedtune.errors import ConfigError
from fedtune.settings import parse_arguments
from fedtune.settings.hf_settings import DEFAULTS, OWNED


def parse(*argv, recipe=None, training_class=SFTConfig):
    return parse_arguments(training_class, list(argv), recipe_file=recipe)


def message(*argv, **kwargs):
    with pytest.raises(ConfigError) as caught:
        parse(*argv, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def recipe(tmp_path):
    """A recipe with a YAML beside it: `recipe("num_rounds: 2")` -> path of the script."""

    def write(text, name="job"):
        (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{name}.py"

    return write


def test_flag_wins_over_yaml_and_yaml_over_default(recipe):
    script = recipe("num_rounds: 2\nlora_r: 4\n")
    args = parse("--num_rounds", "5", recipe=script)
    assert args.federation.num_rounds == 5
    assert args.adapter.lora_r == 4
    assert args.federation.num_clients == 3
    assert args.run.config == str(script.with_suffix(".yaml"))


def test_config_flag_replaces_the_yaml_beside_the_recipe(recipe):
    other = recipe("lora_r: 2", name="other").with_suffix(".yaml")
    args = parse("--config", str(other), recipe=recipe("num_rounds: 9"))
    assert (args.federation.num_rounds, args.adapter.lora_r) == (3, 2)


def test_no_yaml_is_fine(tmp_path):
    assert parse(recipe=tmp_path / "job.py").run.config is None


@pytest.mark.parametrize("dashes", ["--num-rounds", "--num_rounds"])
def test_both_spellings(dashes):
    assert parse(f"{dashes}=4").federation.num_rounds == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-3", 0.005),
        ("5E3", 5000.0),
        ("1", 1.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("1_000.0", 1000.0),
    ],
)
def test_yaml_numbers(recipe, text, value):
    args = parse(recipe=recipe(f"weight_decay: {text}"))
    assert args.training.weight_decay == value
    assert isinstance(args.training.weight_decay, float)


@pytest.mark.parametrize("text", ["e5", "1e", "5e-3x", '"5e-3"', "true"])
def test_yaml_that_is_no_number(recipe, text):
    assert "`weight_decay` expects a number" in message(recipe=recipe(f"weight_decay: {text}"))


def test_yaml_text_stays_text(recipe):
    args = parse(recipe=recipe("text_column: e5\nlabel_column: '12'"))
    assert (args.data.text_column, args.data.label_column) == ("e5", "12")


def test_yaml_null_lists_mappings_and_booleans(recipe):
    args = parse(
        recipe=recipe(
            "eval_file: null\nseeds: [1, 2]\nlora_target_modules: [q_proj, v_proj]\n"
            "strategy_args: {mu: 1e-1}\nmin_replies: 0.5\nuse_rslora: yes\nlogging_strategy: no\n"
            "lr_scheduler_kwargs: {num_cycles: 1}\nreport_to: [tensorboard]\nmax_length: null\n"
        )
    )
    assert args.data.eval_file is None
    assert args.seeds == [1, 2]
    assert args.training.seed == 1
    assert args.adapter.lora_target_modules == "q_proj,v_proj"
    assert args.federation.strategy_args == "mu=0.1"
    assert args.federation.min_replies == "0.5"
    assert args.adapter.use_rslora is True
    assert args.training.logging_strategy == "no"
    assert args.training.lr_scheduler_kwargs == {"num_cycles": 1}
    assert args.training.report_to == ["tensorboard"]
    assert args.training.max_length is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("num_rounds: three", "`num_rounds` expects a whole number, received 'three'"),
        ("num_rounds: 2.5", "expects a whole number"),
        ("num_rounds: true", "expects a whole number"),
        ("num_rounds: null", "expects a whole number, received None"),
        ("num_rounds: [1]", "expects a whole number"),
        ("steps_per_round: x", "expects a whole number or null"),
        ("use_rslora: 1", "expects true or false"),
        ("text_column: [a]", "expects text or null"),
        ("peft_method: lorra", "Did you mean lora?"),
        ("lr_scheduler_type: cosin", "Did you mean cosine?"),
        ("engine: 3", "expects one of inline, ray, flower; received 3"),
    ],
)
def test_yaml_of_the_wrong_type(recipe, line, expected):
    script = recipe(line)
    text = message(recipe=script)
    assert expected in text
    assert str(script.with_suffix(".yaml")) in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_round: 3", "unknown key `num_round`. Did you mean num_rounds?"),
        ("config: x.yaml", "unknown key `config`"),
        ("max_steps: 3", "`max_steps` in"),
        ("- a\n- b", "received a list"),
        ("a: [", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("lora_r: 1\nlora_r: 2", "`lora_r` is given twice (line 2)"),
        ("x: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_bad_yaml(recipe, text, expected):
    script = recipe(text)
    assert expected in message(recipe=script)
    assert "job.yaml" in message(recipe=script)


def test_config_file_that_cannot_be_read(tmp_path):
    assert "No such file" in message("--config", str(tmp_path / "no.yaml"))
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message("--config", str(tmp_path / "bin.yaml"))
    assert "cannot read" in message("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--num_round", "3"], "unknown flag --num_round. Did you mean --num_rounds?"),
        (["--num_r=3"], "unknown flag --num_r."),
        (["--lerning_rate", "1"], "Did you mean --learning_rate?"),
        (["3"], "unexpected argument '3'"),
        (["--num_rounds", "x"], "--num_rounds: expected a whole number, received 'x'"),
        (["--num_rounds"], "--num_rounds: expected one argument"),
        (["--peft_method", "lorra"], "Did you mean lora?"),
        (["--resume", "maybe"], "--resume: expected true or false, received 'maybe'"),
        (["--seed", "1", "--seeds", "2"], "--seed S is --seeds S"),
        (["--seeds", "1,a"], "--seeds: expected whole numbers"),
        (["--warmup_steps", "-3"], "SFTConfig refuses these settings"),
        (["--lr_scheduler_kwargs", "{a"], "SFTConfig refuses these settings"),
    ],
)
def test_bad_flags(argv, expected):
    assert expected in message(*argv)


@pytest.mark.parametrize("name", sorted(OWNED))
@pytest.mark.parametrize("training_class", [SFTConfig, TrainingArguments])
def test_owned_settings_are_refused(name, training_class, recipe):
    assert message(f"--{name}=1", training_class=training_class).startswith(f"--{name} is decided")
    text = message(recipe=recipe(f"{name}: null"), training_class=training_class)
    assert f"`{name}` in " in text
    assert OWNED[name] in text


def test_owned_settings_are_refused_at_their_default_value_too():
    assert "--num_rounds" in message("--num_train_epochs", "3.0")
    assert "--resume" in message("--resume_from_checkpoint", "x")


def test_tables_name_real_settings():
    fields = set(SFTConfig.__dataclass_fields__)
    assert set(OWNED) <= fields
    assert {row.name for row in DEFAULTS} <= fields


def test_a_flag_drops_the_yaml_value_that_excludes_it(recipe):
    args = parse("--epochs_per_round", "2", recipe=recipe("steps_per_round: 10\nseed: 7"))
    assert (args.federation.steps_per_round, args.federation.epochs_per_round) == (None, 2.0)
    assert args.federation.budget == (0, 2.0)
    assert args.seeds == [7]
    assert parse("--seeds", "1,2", recipe=recipe("seed: 7")).seeds == [1, 2]
    assert parse("--seed", "3", recipe=recipe("seeds: [1, 2]")).seeds == [3]


@pytest.mark.parametrize(
    ("flags", "budget"),
    [("", (0, 1.0)), ("--steps_per_round 5", (5, 0.0)), ("--epochs_per_round 0.5", (0, 0.5))],
)
def test_the_budget_of_a_round(flags, budget):
    assert parse(*flags.split()).federation.budget == budget


def test_a_flag_drops_the_detail_of_another_kind(recipe):
    script = recipe("partition: column\npartition_column: silo\nstrategy_args: {mu: 1}\n")
    assert parse("--partition", "iid", recipe=script).data.partition_column is None
    assert parse("--partition", "dirichlet", recipe=script).data.partition_column is None
    assert parse("--partition", "column", recipe=script).data.partition_column == "silo"
    own = parse("--partition", "dirichlet", "--partition_column", "x", recipe=script)
    assert own.data.partition_column == "x"
    assert parse("--strategy", "other", recipe=script).federation.strategy_args is None


def test_defaults_without_an_accelerator(monkeypatch):
    monkeypatch.setattr("fedtune.settings.parse._accelerator", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # the old name of activation checkpointing
        training = parse().training
    assert (training.use_cpu, training.bf16, training.fp16) == (True, False, False)
    assert training.gradient_checkpointing is False
    assert training.report_to == []
    assert (training.save_strategy, training.eval_strategy) == ("no", "no")
    assert (training.seed, training.data_seed) == (42, 42)
    assert training.disable_tqdm is True


def test_what_the_user_sets_stays(recipe):
    script = recipe("data_seed: 7\nreport_to: tensorboard\nbf16: true\n")
    training = parse("--gradient_checkpointing", "--disable_tqdm=false", recipe=script).training
    assert (training.data_seed, training.report_to) == (7, ["tensorboard"])
    assert (training.bf16, training.disable_tqdm) == (True, False)
    assert training.gradient_checkpointing is True


def test_optional_booleans_need_no_value():
    assert parse("--bf16").training.bf16 is True
    assert parse("--no_remove_unused_columns").training.remove_unused_columns is False
    assert parse("--use_rslora").adapter.use_rslora is True


def test_data_seed_does_not_follow_the_seed():
    assert parse("--seed", "1").training.data_seed == 42


def test_output_dir_is_named_after_the_recipe_and_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedtune.settings.parse.time.strftime", lambda _: "20260101-000000")
    first = parse(recipe="recipes/lora_sft.py").training.output_dir
    assert first == "outputs/lora_sft-20260101-000000"
    assert not Path(first).exists()
    Path(first).mkdir(parents=True)
    assert parse(recipe="recipes/lora_sft.py").training.output_dir == f"{first}-2"
    assert parse("--output_dir", "x").training.output_dir == "x"


def test_the_dataclasses_stay_as_they_are():
    parse()
    assert not hasattr(SFTConfig, "_argument_group_name")
    assert type(parse().training) is SFTConfig
    assert type(parse(training_class=TrainingArguments).training) is TrainingArguments


@pytest.mark.parametrize("training_class", [SFTConfig, TrainingArguments])
def test_help_is_grouped_and_hides_owned_settings(capsys, training_class):
    with pytest.raises(SystemExit) as caught:
        parse("--help", "--no_such_flag", training_class=training_class)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    titles = ("Base model", "Adapter", "Data", "Federation", "Transport", "Run")
    places = [text.index(f"\n{title}:\n") for title in (*titles, "HuggingFace Trainer")]
    assert places == sorted(places)
    assert "--max_steps" not in text
    assert "--learning_rate" in text
    assert "--num_rounds NUM_ROUNDS" in text
    assert "--num-rounds" not in text


def test_help_survives_a_percent_sign(capsys):
    from dataclasses import dataclass, field

    @dataclass
    class Percent(TrainingArguments):
        odd: int = field(default=1, metadata={"help": "about 20% slower"})

    globals()["Percent"] = Percent
    with pytest.raises(SystemExit):
        parse("-h", training_class=Percent)
    assert "about 20% slower (default: 1)" in capsys.readouterr().out
