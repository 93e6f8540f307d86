"""Small runs with labels, on 1,000 images of the quickstart and a published ViT of a tiny shape."""

import json
import tempfile
from pathlib import Path

from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.recipe.sections import Finetune, Linear
from engine.runs.finetune import finetune
from engine.runs.linear import linear
from engine.weights.weights import IMAGENET, About, Weights
from models.architecture import Architecture
from tests.data.images import thinned

ROOT = Path(__file__).parents[2]
CHECKPOINT = str(ROOT / "tests/golden/I_vit_small_shape.pth.tar")
VAL = ROOT / "recipes/data/fashion_mnist/val.tar"
_HELD = tempfile.TemporaryDirectory()  # until this process ends
# A hundred of them, which is enough to evaluate; each process has a file of its own.
FEW = thinned(VAL, 10, Path(_HELD.name) / "val.tar")
FINETUNE = ROOT / "recipes/finetune_quickstart.yaml"
FOUR_STEPS = [
    "train.global_batch_size=100",
    "train.max_steps=4",
    "log.every_steps=1",
    "checkpoint.every_steps=2",
    "optimizer.base_lr=1e-3",
    "parallel.precision=float64",
]
EVERYTHING = [  # every kind of regularization at once
    "model.drop_path=0.3",
    "train.ema_decay=0.9",
    "augment.randaugment=rand-m9-mstd0.5-inc1",
    "augment.erase_probability=0.5",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.repeats=3",
    "augment.interpolation=bicubic",
]


def linear_recipe(directory: Path, *overrides: str) -> Linear:
    """Batches of 300: three and a partial one of 100 in each of two epochs."""
    values = [f"run.dir={directory}", f"data.root={VAL}", f"data.val_root={FEW}", "data.source=shards"]
    values += ["data.workers=0", "train.global_batch_size=300", "train.epochs=2", "log.every_steps=1"]
    values += ["optimizer.base_lr=0.5", "checkpoint.every_steps=3"]
    return load(ROOT / "recipes/linear_vit.yaml", [*values, *overrides], Linear)


def run_linear(recipe: Linear) -> dict:
    with process_group() as world:
        return linear(recipe, CHECKPOINT, "base", world)


def finetune_recipe(directory: Path, *overrides: str) -> Finetune:
    """Batches of 100, four steps."""
    values = [f"run.dir={directory}", f"data.root={VAL}", f"data.val_root={FEW}"]
    return load(FINETUNE, [*values, *FOUR_STEPS, *overrides], Finetune)


def run_finetune(recipe: Finetune, checkpoint: str = CHECKPOINT, baseline: str | None = None) -> dict:
    with process_group() as world:
        return finetune(recipe, checkpoint, "base", baseline, world)


def undrawn(architecture: Architecture, image_size: int) -> Weights:
    """Weights that no file holds: a run draws them."""
    return Weights(About(architecture, image_size, *IMAGENET), {}, lambda names: iter(()), architecture.name)


def rows(directory: Path, key: str) -> list[dict]:
    """Of metrics.jsonl, those with the key."""
    return [row for row in map(json.loads, (directory / "metrics.jsonl").open()) if key in row]
