"""Pre-train: `mocov3 run RECIPE [dotted.key=value ...]`, or `python -m engine.run`.

On several nodes `torchrun ... -m engine.run RECIPE [dotted.key=value ...]`.

The same command again resumes the run from its newest checkpoint, or says that it is finished.
"""

from pathlib import Path

from engine.cli import Parser, add_overrides, add_recipe, refuse
from engine.distributed.launcher import ranks
from engine.door import enter, joined, show
from engine.launch import launch, read_ranks, read_restarts
from engine.logger import note, say
from engine.recipe.load import check_world, load
from engine.recipe.paths import check_paths
from engine.recipe.sections import Pretrain


def main(arguments: list[str]) -> None:
    parser = Parser("engine.run", __doc__)
    add_recipe(parser)
    add_overrides(parser, "train.max_steps=100")
    parser.add_argument("--ranks", type=read_ranks, help="processes on this node, a number or gpus (default: this one)")
    again = "starts after the first, where a rank of --ranks dies or fails (default: 0)"
    parser.add_argument("--max-restarts", type=read_restarts, metavar="N", help=again)
    back = "go on from this checkpoint of the run's own; later ones are set aside (default: the newest)"
    parser.add_argument("--from", type=Path, dest="earlier", metavar="PATH", help=back)
    parser.add_argument(
        "--print", action="store_true", help="the recipe, resolved, with sizes, memory and schedule; starts nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    if (options.ranks or 1) == 1:
        refuse(options, ["--max-restarts"], "without --ranks N; torchrun has an option of this name")

    recipe = load(options.recipe, options.overrides)
    check_world(recipe, options.ranks or ranks())
    check_paths(recipe)
    if options.print:
        _print(recipe, options.recipe, options.ranks or 1)
    elif (options.ranks or 1) > 1:
        note(f"{options.ranks} ranks: loading PyTorch")
        earlier = ["--from", str(options.earlier)] if options.earlier else []
        launch("run", [str(options.recipe), *options.overrides, *earlier], options.ranks, options.max_restarts or 0)
    else:
        _pretrain(recipe, options.recipe, options.earlier)


# PyTorch takes seconds to load, and a mistake in the recipe should show before.


def _print(recipe: Pretrain, file: Path, ranks: int) -> None:
    with joined(str(file)) as world:
        from engine.runs.preview import preview

        text = preview(recipe, file, world, ranks)
    show(text)


def _pretrain(recipe: Pretrain, file: Path, earlier: Path | None) -> None:
    say(f"{file} -> {recipe.run.dir}: loading PyTorch")
    from engine.distributed.world import process_group
    from engine.runs.pretrain import pretrain

    with process_group() as world:
        pretrain(recipe, file, world, earlier)


if __name__ == "__main__":
    enter(main)
