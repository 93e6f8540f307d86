"""Import weights: `mocov3 import FILE RUN_DIR --recipe RECIPE [dotted.key=value ...]`.

FILE is a published .pth.tar, an export of this project, a folder of timm or transformers, or a trunk of others.
Then `mocov3 run RECIPE run.dir=RUN_DIR [key=value ...]` goes on from it. The optimizer starts fresh.
"""

import json

from engine.cli import Parser, add_overrides, add_recipe
from engine.door import enter, result
from engine.recipe.load import load


def main(arguments: list[str]) -> None:
    parser = Parser("engine.import_weights", __doc__)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    add_recipe(parser, "--recipe", required=True)
    parser.add_argument("--interpolate-positions", action="store_true", help="resize learned position embeddings")
    add_overrides(parser, "model.heads=6")
    options = parser.parse_intermixed_args(arguments)
    recipe = load(options.recipe, [*options.overrides, f"run.dir={json.dumps(options.run_dir)}"])

    from engine.runs.importing import import_weights  # takes seconds, and a mistake in the recipe should show before

    result(import_weights(options.file, recipe, interpolate=options.interpolate_positions))


if __name__ == "__main__":
    enter(main)
