"""Pre-train: `torchrun ... -m engine.run RECIPE [dotted.key=value ...]`, or `python -m engine.run` for one process.

The same command again resumes the run from its newest checkpoint, or says that it is finished.
"""

from pathlib import Path

from engine.cli import Parser, add_overrides, enter
from engine.distributed.launcher import ranks
from engine.logger import say
from engine.recipe.load import check_world, load


def main(arguments: list[str]) -> None:
    parser = Parser("engine.run", __doc__)
    parser.add_argument("recipe", type=Path, help="a YAML file, as in recipes/")
    add_overrides(parser, "train.max_steps=100")
    options = parser.parse_args(arguments)

    recipe = load(options.recipe, options.overrides)
    check_world(recipe, ranks())
    say(f"{options.recipe} -> {recipe.run.dir}: loading PyTorch")
    # These imports take seconds, and a mistake in the recipe should show before.
    from engine.distributed.world import process_group
    from engine.runs.pretrain import pretrain

    with process_group() as world:
        pretrain(recipe, options.recipe, world)


if __name__ == "__main__":
    enter(main)
