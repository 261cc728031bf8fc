"""`lora_sft.py` with two held-out sets of unequal size, by name."""

import runpy

from tests.conftest import REPOSITORY

recipe = runpy.run_path(str(REPOSITORY / "recipes" / "lora_sft.py"), run_name="recipe")
FIRST = 2  # rows of the first set


def build_model(args):
    return recipe["build_model"](args)


def build_trainer(args, model, tokenizer, train, evaluation):
    trainer = recipe["build_trainer"](args, model, tokenizer, train, evaluation)
    if evaluation is not None:
        rows = trainer.eval_dataset
        trainer.eval_dataset = {
            "few": rows.select(range(FIRST)),
            "many": rows.select(range(FIRST, len(rows))),
        }
    return trainer
