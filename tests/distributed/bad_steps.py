"""Runs of every task whose gradients are not finite from some step on, logged every seventh step; one line of JSON for
each says how it ended. Takes the folder for the runs."""

import json
import sys
from pathlib import Path

import torch

from engine.distributed.world import World, process_group
from engine.errors import RunFailed
from engine.recipe.load import load
from engine.runs.finetune import Finetuning, finetune
from engine.runs.linear import LinearClassification, linear
from engine.runs.pretrain import Pretraining, pretrain
from engine.runs.task import Task
from tests.distributed.trajectories import KINDS, RECIPE, SMALL
from tests.runs.small import CHECKPOINT, VAL, finetune_recipe, linear_recipe

FROM = 2  # finished steps before the first bad one, which only the last rank meets
RARE = ("log.every_steps=7", "checkpoint.every_steps=100")
SHARED = f"data.val_root={VAL}"


def spoil(task: type[Task]) -> None:
    images = task.images

    def spoilt(self, batch):
        made = images(self, batch)
        return made * torch.nan if self.step >= FROM and self.world.rank == self.world.size - 1 else made

    task.images = spoilt


def runs(folder: Path, world: World) -> None:
    values = [*SMALL, *KINDS["vit"], "data.workers=0", f"run.dir={folder / 'pretrain'}", *RARE]
    for name, run in {
        "pretrain": lambda: pretrain(load(RECIPE, values), RECIPE, world),
        "linear": lambda: linear(linear_recipe(folder / "linear", *RARE, SHARED), CHECKPOINT, "base", world),
        "finetune": lambda: finetune(
            finetune_recipe(folder / "finetune", "train.max_steps=20", *RARE, SHARED), CHECKPOINT, "base", None, world
        ),
    }.items():
        try:
            run()
            words = "done"
        except RunFailed as failure:
            words = str(failure)
        if world.is_first:
            print(json.dumps({"task": name, "words": words}), flush=True)


if __name__ == "__main__":
    for each in (Pretraining, LinearClassification, Finetuning):
        spoil(each)
    with process_group() as world:
        runs(Path(sys.argv[1]), world)
