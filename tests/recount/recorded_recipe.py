"""A recipe in a process that is recorded: this file is what the clients' processes run too."""

import os
import runpy

from tests.recount.recorder import record_in_child

RECIPE = "FEDTUNE_TEST_RECIPE"  # path of the recipe

recipe = runpy.run_path(os.environ[RECIPE], run_name="recipe")


def build_model(args):
    return recipe["build_model"](args)


def build_trainer(*args):
    return recipe["build_trainer"](*args)


if __name__ == "__main__":
    import fedtune

    record_in_child()
    fedtune.launch(build_model, build_trainer)
