from dataclasses import dataclass

import pytest
from trl import SFTConfig

from fedtune import checks
from fedtune.checks import check_arguments
from fedtune.errors import ConfigError
from fedtune.lists import strategy_settings
from fedtune.settings import parse_arguments
from fedtune.strategies import METHODS, Correction, Method, ServerOptimizer


def check(text):
    check_arguments(parse_arguments(SFTConfig, text.split()))


def message(text):
    with pytest.raises(ConfigError) as caught:
        check(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--num_clients 1 --min_replies 1",
        "--num_clients 4 --fraction_train 0.5 --min_replies 2",
        "--min_replies 0.5",
        "--min_replies 1.0",
        "--steps_per_round 5",
        "--epochs_per_round 0.5",
        "--load_in_4bit",
        "--partition column --partition_column silo",
        "--partition dirichlet --partition_column label",
        "--partition dirichlet",
        "--peft_method p_tuning --encoder_reparameterization_type LSTM --encoder_hidden_size 64",
        "--peft_method prefix_tuning --prefix_projection --encoder_hidden_size 64",
        "--peft_method dora --use_rslora --modules_to_save score",
        "--seeds 1,2,3 --compare all",
        "--compare centralized,local",
        "--compare none",
        "--client_state reset --compare local",
        "--strategy flexlora --client_ranks 4,8,16",
        "--strategy fedprox+hetlora --client_ranks 4,8,16",
        "--strategy fedavg --client_ranks 4,4,4",
        "--peft_method dora --client_ranks 4,4,4",
        "--codec nf4 --codec_on weights --codec_direction down",
        "--codec int8 --error_feedback --codec_direction up",
        "--codec fp4 --strategy flora",
        "--codec none --error_feedback false",
        "--codec bf16 --peft_method none --codec_args exclude=*norm*",
    ],
)
def test_what_goes_together(text):
    check(text)


def test_control_variates_need_every_step():
    """Set on the arguments: HuggingFace itself refuses --fp16 without a GPU."""
    for method, refused in (("scaffold", True), ("scaffold+fedavgm", True), ("fedprox", False)):
        args = parse_arguments(SFTConfig, ["--strategy", method])
        args.training.fp16 = True
        if refused:
            with pytest.raises(ConfigError, match=r"with --fp16: .*Use --bf16"):
                check_arguments(args)
        else:
            check_arguments(args)


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("num_clients", "0 -1"),
        ("num_rounds", "0"),
        ("steps_per_round", "0"),
        ("epochs_per_round", "0 -1 nan inf"),
        ("fraction_train", "0 1.1 nan"),
        ("round_timeout_s", "0 -1 nan inf"),
        ("max_failed_rounds", "-1"),
        ("save_every_rounds", "0"),
        ("eval_fraction", "0 1 nan"),
        ("partition_alpha", "0 nan"),
        ("lora_r", "0"),
        ("lora_alpha", "0"),
        ("lora_dropout", "1 -0.1 nan"),
        ("num_virtual_tokens", "0"),
        ("encoder_hidden_size", "0"),
        ("max_rows", "1"),
        ("min_rows", "0"),
        ("gpus_per_client", "-1 nan"),
        ("cpus_per_client", "0"),
        ("learning_rate", "-1 nan"),
        ("per_device_train_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("seeds", "-1 4294967296"),
    ],
)
def test_ranges(flag, values):
    for value in values.split():
        text = message(f"--{flag} {value}")
        assert text.startswith(f"--{flag}: expected ")
        assert "received" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--steps_per_round 5 --epochs_per_round 1", "both set"),
        ("--max_client_weight 0", "--max_client_weight: expected a share > 0 and <= 1, received 0"),
        ("--max_client_weight 1.5", "a share > 0 and <= 1, received 1.5"),
        ("--max_client_weight nan", "a share > 0 and <= 1, received nan"),
        ("--max_update_norm 0", "--max_update_norm: expected a number > 0, received 0"),
        ("--max_update_norm inf", "a number > 0, received inf"),
        ("--update_check drop", "update_check"),
        ("--min_replies 4", "at most 3, the clients asked"),
        ("--num_clients 10 --fraction_train 0.2 --min_replies 3", "at most 2"),
        ("--min_replies 0", "received '0'"),
        ("--min_replies 0.0", "received '0.0'"),
        ("--min_replies 1.5", "received '1.5'"),
        ("--min_replies most", "received 'most'"),
        ("--min_replies 1e-1", "received '1e-1'"),
        ("--min_replies nan", "received 'nan'"),
        ("--seeds 1,2,1", "1 is given twice"),
        ("--load_in_4bit --load_in_8bit", "both set"),
        ("--load_in_8bit --peft_method none", "--load_in_8bit with --peft_method none"),
        ("--use_rslora --peft_method ia3", "--use_rslora needs"),
        ("--modules_to_save score --peft_method p_tuning", "--modules_to_save does not go"),
        ("--modules_to_save score --peft_method none", "--modules_to_save does not go"),
        ("--prefix_projection", "--prefix_projection needs"),
        ("--encoder_reparameterization_type LSTM", "needs --peft_method p_tuning"),
        ("--encoder_hidden_size 7", "--encoder_hidden_size needs"),
        ("--encoder_hidden_size 7 --peft_method prefix_tuning", "--prefix_projection"),
        ("--dataset_name a --train_file b", "both set"),
        ("--partition column", "needs --partition_column"),
        ("--partition size --partition_column a", "no effect"),
        ("--partition_column a", "no effect"),
        ("--train_file no.jsonl", "--train_file: no file no.jsonl"),
        ("--eval_file no.jsonl", "--eval_file: no file"),
        ("--init_adapter no", "--init_adapter: no directory"),
        ("--compare centralised", "Did you mean centralized?"),
        ("--compare all,local", "`all` stands alone"),
        ("--compare none,local", "`none` stands alone"),
        ("--compare parity --client_state reset", "--client_state carry"),
        ("--compare all --client_state reset", "--client_state carry"),
        ("--track tensorbord", "Did you mean tensorboard?"),
        ("--strategy fedavgg", "Did you mean fedavg?"),
        ("--strategy fedavg+", "unknown method ''"),
        ("--strategy fedavg+fedavg", "combines with no other method"),
        ("--strategy_args mu=0.1", "'mu' is no setting of fedavg"),
        ("--strategy_args mu", "expected name=number"),
        ("--gpus_per_client 0.5", "Use --engine ray"),
        ("--cpus_per_client 2", "Use --engine ray"),
        ("--resume --overwrite", "both set"),
        ("--strategy flora --client_ranks 4,8", "expected 3 whole numbers >= 1, one per client"),
        ("--strategy flora --client_ranks 4,8,0", "received 4,8,0"),
        ("--strategy flora --client_ranks 4,8,x", "--client_ranks: expected whole numbers"),
        ("--strategy fedavg --client_ranks 4,8,8", "Use flora, flexlora, hetlora, raflora."),
        ("--strategy ffa_lora --client_ranks 4,8,8", "it needs equal ranks"),
        ("--strategy fedex_lora --client_ranks 4,8,8", "it needs equal ranks"),
        ("--strategy scaffold --client_ranks 4,8,8", "it needs equal ranks"),
        ("--strategy scaffold+flexlora --client_ranks 4,8,8", "Leave one of them out"),
        ("--peft_method dora --client_ranks 4,8,8", "it needs equal ranks"),
        ("--strategy flora --peft_method dora --client_ranks 4,8,8", "expected --peft_method lora"),
        ("--peft_method p_tuning --client_ranks 4,4,4", "--client_ranks needs --peft_method lora"),
        ("--peft_method none --client_ranks 4,4,4", "--client_ranks needs --peft_method lora"),
        ("--codec_on weights", "--codec_on has no effect with --codec none"),
        ("--codec_direction up", "--codec_direction has no effect with --codec none"),
        ("--error_feedback", "--error_feedback has no effect with --codec none"),
        ("--codec_args min_size=9", "--codec_args has no effect with --codec none"),
        ("--codec_args min_sise=9", "Did you mean min_size?"),
        ("--codec nf4 --codec_args include=", "expected include=GLOB"),
        ("--codec nf4 --codec_on weights --error_feedback", "Use --codec_on delta"),
        ("--codec nf4 --codec_direction down --error_feedback", "Use both or up"),
        ("--codec nf4 --strategy fedprox+flora --error_feedback", "--strategy fedprox+flora: its"),
    ],
)
def test_what_does_not(text, expected):
    assert expected in message(text)


def test_files_that_exist_pass(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    check(f"--train_file {file} --eval_file {file} --init_adapter {tmp_path}")


def test_sharded_training_is_refused():
    args = parse_arguments(SFTConfig, [])
    args.training.fsdp = True
    with pytest.raises(ConfigError, match="--fsdp"):
        check_arguments(args)


@pytest.mark.parametrize(
    ("text", "package", "extra"),
    [("--engine ray", "ray", "ray"), ("--track wandb,tensorboard", "tensorboard", "tracking")],
)
def test_missing_packages(monkeypatch, text, package, extra):
    monkeypatch.setattr(checks.run, "_installed", lambda name: name != package)
    assert f"pip install 'fedtune[{extra}]'" in message(text)
    monkeypatch.setattr(checks.run, "_installed", lambda name: True)
    check(text)


def test_resume_needs_a_durable_engine(monkeypatch):
    monkeypatch.setattr(checks.run, "_installed", lambda name: True)
    assert "--engine inline" in message("--engine ray --resume")


def test_the_method_is_built_once(monkeypatch):
    built = []

    def strategy_of(federation):
        built.append(federation.strategy)
        return Method()

    monkeypatch.setattr(checks.method, "strategy_of", strategy_of)
    check("--codec nf4 --client_ranks 4,4,4")
    assert built == ["fedavg"]


def test_methods_of_one_axis_do_not_combine(monkeypatch):
    @dataclass(frozen=True)
    class Proximal(Correction):
        name = "prox"
        mu: float = 0.1

    @dataclass(frozen=True)
    class ServerStep(ServerOptimizer):
        beta: float = 0.9

        def move(self, delta, memory):
            return self.beta * delta, {}

    for name, cls in (("prox", Proximal), ("scaf", Proximal), ("adam", ServerStep)):
        monkeypatch.setitem(METHODS.built_in, name, cls)
    check("--strategy prox+adam --strategy_args mu=1,beta=0.5")
    assert "second correction" in message("--strategy prox+scaf")
    assert "Did you mean beta?" in message("--strategy prox+adam --strategy_args betta=0.5")
    check("--strategy scaf --client_state reset")  # what a method keeps is not the optimizer's


def test_strategy_settings():
    assert strategy_settings(None) == {}
    assert strategy_settings(" mu = 1e-2 , tau=5 ") == {"mu": 0.01, "tau": 5.0}
    for text in ("mu", "mu=", "=1", "mu=x", "mu=nan", "mu=1,mu=2"):
        with pytest.raises(ConfigError, match="--strategy_args"):
            strategy_settings(text)


def test_a_rule_that_needs_more_clients():
    assert "at least 5 clients" in message("--strategy krum --num_clients 4")
    assert "received 3" in message("--strategy krum --num_clients 6 --fraction_train 0.5")
    check("--strategy krum --num_clients 5")
    check("--strategy krum --strategy_args f=0 --num_clients 3")


@pytest.mark.parametrize("name", ["adamw", "radam", "sgd"])
def test_schedule_free_optimizers_are_refused(name):
    text = message(f"--optim schedule_free_{name}")
    assert f"--optim schedule_free_{name}: it keeps weights of its own" in text
    assert "Use adamw_torch" in text


@pytest.mark.parametrize(
    "name", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"]
)
def test_optimizers_inside_of_the_backward_pass_are_refused(name):
    assert f"--optim {name}: it steps inside of the backward pass" in message(f"--optim {name}")


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_are_refused_in_one_line(name, tmp_path):
    """HuggingFace's own words ask for an eval strategy, which the federation owns."""
    said = message(f"--lr_scheduler_type {name}")
    assert f"--lr_scheduler_type {name}: it follows the Trainer's own evaluation" in said
    assert "Use linear, cosine or constant" in said
    file = tmp_path / "run.yaml"
    file.write_text(f"lr_scheduler_type: {name}\n")
    assert message(f"--config {file}") == said


def test_other_optimizers_and_schedules_stay():
    for text in ("--optim adafactor", "--optim sgd", "--lr_scheduler_type cosine_with_restarts"):
        check(text)


def test_sequential_rows_do_not_begin_anew():
    text = "--train_sampling_strategy sequential"
    check(text)
    assert "begin with the same rows" in message(f"{text} --client_state reset")
