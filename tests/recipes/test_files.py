"""The recipes as files: short, flat, listed, and a YAML that explains each of its values."""

from __future__ import annotations

import re

import pytest
import yaml

from fedtune.run import launch
from tests.conftest import REPOSITORY
from tests.recipes.runs import RECIPES, SCRIPTS, demo_of, recipe, run_here

COMMENTED = re.compile(r"^[a-z_0-9]+: \S.*?\s+# \S.{9,}$")

each_recipe = pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)


def test_recipes_are_found():
    assert {"lora_sft", "mixed_ranks", "ptuning_sentiment", "seq_cls_lora"} <= {
        path.stem for path in RECIPES
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_listed(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 150
    assert f"python recipes/{script.name}" in text
    assert script.name in (REPOSITORY / "recipes" / "README.md").read_text()


YAMLS = [
    (script, file) for script in RECIPES for file in (script.with_suffix(".yaml"), demo_of(script))
]

each_yaml = pytest.mark.parametrize(("script", "file"), YAMLS, ids=lambda path: path.name)


@each_yaml
def test_every_yaml_value_has_a_reason(script, file):
    header, *lines = file.read_text().splitlines()
    assert header.startswith(f"# python recipes/{script.name}")
    assert lines
    for line in lines:
        assert COMMENTED.match(line), line
        assert len(line) <= 110


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """`parsed(script, *flags)`: the settings of a run, which is not begun, and what was said."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(launch, "run", lambda args, *_: seen.append(args))

    def parse(script, *flags):
        done = run_here(script, *flags)
        assert done.status == 0, done.err
        return seen.pop()

    return parse


@each_yaml
def test_the_yaml_is_valid(script, file, parsed):
    """The recipe's own parser accepts it, with values that can work together."""
    assert parsed(script, "--config", file).run.config == str(file)


@each_recipe
def test_a_recipe_is_set_for_a_real_model_and_says_so_with_the_tiny_one(script, parsed):
    args = parsed(script)
    assert args.run.config == str(script.with_suffix(".yaml"))
    assert args.data.partition == "iid"
    assert (args.training.lr_scheduler_type, args.training.warmup_steps > 0) == ("cosine", True)
    rate = {"p_tuning": 5e-3}.get(args.adapter.peft_method, 2e-4)
    assert args.training.learning_rate == rate
    (said,) = args.hints
    assert "for a real model" in said
    assert said.endswith(demo_of(script).name)
    assert parsed(script, "--config", demo_of(script)).hints == ()
    assert parsed(script, "--model_name_or_path", "somewhere").hints == ()


def test_a_demo_file_is_whole(parsed):
    """`--config` replaces the recipe's own file, of which nothing may be missing."""
    for script in RECIPES:
        own, demo = (
            set(yaml.safe_load(path.read_text()))
            for path in (script.with_suffix(".yaml"), demo_of(script))
        )
        assert own - demo <= {"warmup_steps"}


def test_an_adapter_of_another_kind_gets_a_rate_of_its_own(parsed):
    script = recipe("lora_sft")
    model = ("--model_name_or_path", "somewhere")
    rates = {"p_tuning": 5e-3, "ia3": 3e-3, "none": 2e-5, "dora": 2e-4, "lora": 2e-4}
    for method, rate in rates.items():
        args = parsed(script, *model, "--peft_method", method)
        assert args.training.learning_rate == rate
        assert any(f"that of {method}" in hint for hint in args.hints) is (rate != 2e-4)
    mine = parsed(script, *model, "--peft_method", "p_tuning", "--learning_rate", "0.5")
    assert mine.training.learning_rate == 0.5
    other = parsed(recipe("ptuning_sentiment"), *model, "--peft_method", "prefix_tuning")
    assert other.training.learning_rate == 1e-2


def test_no_yaml_is_left_over():
    files = {file for _, file in YAMLS}
    assert files == set((REPOSITORY / "recipes").rglob("*.yaml"))


@each_recipe
def test_help(script):
    done = run_here(script, "--help")
    assert (done.status, done.err) == (0, "")
    groups = ("Base model", "Adapter", "Data", "Federation", "Transport", "Run")
    for group in (*groups, "HuggingFace Trainer"):
        assert f"\n{group}:" in done.out
    assert "--max_steps" not in done.out
