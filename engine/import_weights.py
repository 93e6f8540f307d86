"""Import weights: `python -m engine.import_weights FILE RUN_DIR --recipe RECIPE [dotted.key=value ...]`.

FILE is a published .pth.tar, an export of this project, or a trunk of timm, torchvision, DeiT, DINO or MAE.
Then `python -m engine.run RECIPE run.dir=RUN_DIR [key=value ...]` goes on from it. The optimizer starts fresh.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from engine.cli import Parser, enter
from engine.errors import UserError
from engine.logger import say_once
from engine.recipe.load import Pretrain, load

OF_TRUNK = ("base.projector", "momentum.trunk", "momentum.projector", "predictor")  # what a trunk alone lacks


def main(arguments: list[str]) -> None:
    parser = Parser("engine.import_weights", __doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--recipe", required=True, type=Path, help="a YAML file, as in recipes/")
    parser.add_argument("--interpolate-positions", action="store_true", help="resize learned position embeddings")
    parser.add_argument("overrides", nargs="*", default=[], metavar="dotted.key=value", help="e.g. model.heads=6")
    options = parser.parse_intermixed_args(arguments)

    recipe = load(options.recipe, [*options.overrides, f"run.dir={json.dumps(str(options.run_dir))}"])
    print(json.dumps(import_weights(options.file, recipe, interpolate=options.interpolate_positions)))


def import_weights(file: Path, recipe: Pretrain, *, interpolate: bool = False) -> dict[str, Any]:
    """Save step 0 of `recipe.run.dir` with the weights of `file`; what the file lacks starts as in a fresh run.

    Returns {"checkpoint", "fresh"}: its path, and the names of the parts that the file did not have. Raises UserError.
    """
    import torch  # seconds, and a mistake in the recipe should show before

    from engine.checkpoint.layout import checkpoint_folders
    from engine.checkpoint.save import save
    from engine.distributed.world import process_group
    from engine.recipe.identity import fingerprint
    from engine.recipe.load import dump, shape
    from engine.runs.pretrain import build_state, make_networks, make_schedule
    from engine.training.optim import local
    from engine.weights.adopting import adopt
    from engine.weights.opening import open_weights
    from models.architecture import of_name

    checkpoints = Path(recipe.run.dir) / "checkpoints"
    if checkpoint_folders(checkpoints):
        raise UserError(f"RUN_DIR ({recipe.run.dir}) must hold no checkpoint yet; pass another folder")
    source = open_weights(str(file))
    model = recipe.model
    heads = (model.projector_hidden_dim, model.output_dim)
    architecture = of_name(model.name, model.image_size, shape(model))
    weights = adopt(source, architecture, heads, interpolate=interpolate)
    for note in source.notes:
        say_once(note)
    if source.about is None and architecture.kind == "vit":
        count = architecture.arguments["heads"]
        say_once(
            f"{file} does not say how many heads its attention has; {count} are taken, as the recipe's model.heads"
        )

    # One process needs no replicas; what it saves loads into any sharding.
    alone = dataclasses.replace(recipe.parallel, shard="full", replicate=1, compile=False)
    with process_group() as world:
        schedule = make_schedule(recipe, images=recipe.train.global_batch_size)
        state = build_state(dataclasses.replace(recipe, parallel=alone), make_networks(recipe), world, schedule)
        tensors = state.tensors()
        with torch.no_grad():
            for name, value in weights.read(list(weights.shapes)):
                _check_finite(name, value, file)
                copies = [name] if weights.is_whole else [name, name.replace("base.", "momentum.", 1)]
                for copy in copies:
                    local(tensors[f"model.{copy}"]).copy_(value)
        fresh = ["optimizer"] if weights.is_whole else [*OF_TRUNK, "optimizer"]
        say_once(
            f"fresh: {', '.join(fresh)}"
            + ("" if weights.is_whole else "; the momentum trunk is a copy of the base trunk")
        )
        saved = {"step": 0, "recipe": dump(recipe), "data": None, "bad_images": 0}
        saved["licence"] = source.about and source.about.licence
        path = save(checkpoints, 0, tensors, saved, recipe_sha256=fingerprint(recipe), group=world.host_group)
    return {"checkpoint": str(path), "fresh": fresh}


def _check_finite(name: str, value: Any, file: Path) -> None:
    if not value.isfinite().all():
        raise UserError(f"weights ({file}) must be finite; {name} is not: use another file")


if __name__ == "__main__":
    enter(main)
