"""Pre-train: `mocov3 run RECIPE [dotted.key=value ...]`, or `python -m engine.run`.

On several nodes `torchrun ... -m engine.run RECIPE`, with the same arguments.

The same command again resumes the run from its newest checkpoint, or says that it is finished.
"""

from engine.cli import Parser, add_overrides, add_recipe, enter
from engine.distributed.launcher import ranks
from engine.launch import launch, read_ranks
from engine.logger import note, say
from engine.recipe.load import check_world, load


def main(arguments: list[str]) -> None:
    parser = Parser("engine.run", __doc__)
    add_recipe(parser)
    add_overrides(parser, "train.max_steps=100")
    parser.add_argument("--ranks", type=read_ranks, help="processes on this node, a number or gpus (default: this one)")
    parser.add_argument("--print", action="store_true", help="the resolved recipe, sizes, schedule; nothing is started")
    options = parser.parse_intermixed_args(arguments)

    recipe = load(options.recipe, options.overrides)
    check_world(recipe, options.ranks or ranks())
    if options.ranks and options.ranks > 1 and not options.print:
        note(f"{options.ranks} ranks: loading PyTorch")
        launch("run", [str(options.recipe), *options.overrides], options.ranks)
        return
    (note if options.print else say)(f"{options.recipe} -> {recipe.run.dir}: loading PyTorch")
    # These imports take seconds, and a mistake in the recipe should show before.
    from engine.distributed.world import process_group
    from engine.runs.pretrain import pretrain, preview

    with process_group() as world:
        if options.print:
            print(preview(recipe, options.recipe, world))
        else:
            pretrain(recipe, options.recipe, world)


if __name__ == "__main__":
    enter(main)
