"""Several whole runs in one launch, through the real `pretrain`; rank 0's checkpoints and metrics stay for the test.

Takes one JSON list of {"dir", "kind", "overrides"}; `kind` is a key of KINDS.
"""

import json
import sys
from pathlib import Path

import torch

from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.runs.pretrain import pretrain

RECIPE = Path(__file__).parents[2] / "recipes/quickstart.yaml"
# Random images, 7 steps an epoch: 20 steps cross two ends of an epoch and leave the warm-up.
SMALL = [
    "data.source=torchvision",
    "data.dataset=FakeData",
    "data.dataset_options={size: 60, image_size: [3, 36, 40], num_classes: 4}",
    "augment.saturation=0.4",
    "augment.hue=0.1",
    "augment.grayscale_probability=0.2",
    "model.projector_hidden_dim=48",
    "model.output_dim=16",
    "train.global_batch_size=8",
    "train.epochs=3",
    "train.warmup_epochs=1",
    "train.max_steps=20",
    "parallel.precision=float64",
    "checkpoint.keep=9",
    "log.every_steps=1",
    "evaluate.knn_every_epochs=0",
    "evaluate.online_probe=true",
]
KINDS = {
    "vit": ["model.dim=32", "model.heads=2"],
    "vit_conv": [
        "model.name=vit_conv",
        "model.patch_size=8",
        "model.dim=32",
        "model.heads=2",
        "model.depth=1",
        "model.freeze_patch_projection=false",
    ],
    "resnet": ["model.name=timm/test_resnet", "model.freeze_patch_projection=false", "model.image_size=32"]
    + [f"model.{key}=null" for key in ("patch_size", "dim", "depth", "heads")]
    + ["optimizer.name=lars", "optimizer.base_lr=9.6", "moco.temperature=1", "moco.momentum=0.9"],
}


def main(runs: str) -> None:
    torch.manual_seed = torch.default_generator.manual_seed  # FakeData calls it for each image; torch's formats stacks
    with process_group() as world:
        for run in json.loads(runs):
            values = [*SMALL, *KINDS[run["kind"]], f"run.dir={run['dir']}", *run["overrides"]]
            pretrain(load(RECIPE, values), RECIPE, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
