"""The recipes as files: short, flat, listed, and a YAML that explains each of its values."""

from __future__ import annotations

import re

import pytest

from fedtune import launcher
from tests.conftest import REPOSITORY
from tests.recipes.runs import RECIPES, SCRIPTS, run_here

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


@each_recipe
def test_every_yaml_value_has_a_reason(script):
    header, *lines = script.with_suffix(".yaml").read_text().splitlines()
    assert header.startswith(f"# python recipes/{script.name}")
    assert lines
    for line in lines:
        assert COMMENTED.match(line), line
        assert len(line) <= 110


@each_recipe
def test_the_yaml_is_valid(script, monkeypatch, tmp_path):
    """The recipe's own parser accepts it, with values that can work together."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(launcher, "run", lambda args, *_: seen.append(args))
    assert run_here(script).status == 0
    (args,) = seen
    assert args.run.config == str(script.with_suffix(".yaml"))


def test_no_yaml_is_left_over():
    for path in (REPOSITORY / "recipes").rglob("*.yaml"):
        assert path.with_suffix(".py").is_file(), path


@each_recipe
def test_help(script):
    done = run_here(script, "--help")
    assert (done.status, done.err) == (0, "")
    groups = ("Base model", "Adapter", "Data", "Federation", "Transport", "Run")
    for group in (*groups, "HuggingFace Trainer"):
        assert f"\n{group}:" in done.out
    assert "--max_steps" not in done.out
