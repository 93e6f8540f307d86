"""Imported weights: a checkpoint of step 0, from which pre-training goes on."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.layout import checkpoint_folders
from engine.checkpoint.save import save
from engine.checkpoint.state import RunState
from engine.data.jpeg import SIMPLEJPEG, with_version
from engine.data.order import PERMUTED
from engine.distributed.world import process_group
from engine.errors import UserError
from engine.logger import note
from engine.recipe.identity import fingerprint
from engine.recipe.keys import wrong
from engine.recipe.load import Pretrain, dump
from engine.recipe.paths import expand
from engine.runs.pretrain import build_state, make_moco, make_schedule
from engine.runs.starting import finite, fitted, opened
from engine.training.parallelize import local
from engine.weights.weights import Weights

OF_TRUNK = ("base.projector", "momentum.trunk", "momentum.projector", "predictor")  # what a trunk alone lacks


def import_weights(file: str | Path, recipe: Pretrain, *, interpolate: bool = False) -> dict[str, Any]:
    """Save step 0 of `recipe.run.dir` with the weights of `file`; what the file lacks starts as in a fresh run.

    interpolate: resize learned position embeddings of another grid.
    Returns {"checkpoint", "fresh"}: its path, and the names of the parts that the file did not have. Raises UserError.
    """
    checkpoints = expand(recipe.run.dir) / "checkpoints"
    if checkpoint_folders(checkpoints):
        raise UserError(f"RUN_DIR ({recipe.run.dir}) must hold no checkpoint yet; pass another folder")
    if recipe.model.weights is not None:
        raise wrong("model.weights", recipe.model.weights, "null where FILE is imported", "leave one of the two out")
    moco = make_moco(recipe)
    original = opened(str(file), recipe.model)
    weights = fitted(original, recipe.model, interpolate=interpolate)
    # One process needs no replicas; what it saves loads into any sharding.
    alone = dataclasses.replace(recipe.parallel, shard="full", replicate=1, compile=False)
    with process_group() as world:
        schedule = make_schedule(recipe, steps_per_epoch=1)
        state = build_state(dataclasses.replace(recipe, parallel=alone), moco, world, schedule)
        tensors = state.tensors()
        _fill(tensors, weights)
        fresh, copied = ["optimizer"], ""
        if not weights.is_whole:
            fresh, copied = [*OF_TRUNK, "optimizer"], "; the momentum trunk is a copy of the base trunk"
        note(f"fresh: {', '.join(fresh)}{copied}")
        licence = original.about and original.about.licence
        laws = {"order": PERMUTED, "decoder": with_version(SIMPLEJPEG)}  # as of a run that begins now
        saved = RunState(0, dump(recipe), images={}, licence=licence, made_by=world.made_by(), **laws)
        path = save(checkpoints, tensors, saved, recipe_sha256=fingerprint(recipe), group=world.host_group)
    return {"checkpoint": str(path), "fresh": fresh}


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], weights: Weights) -> None:
    """Both encoders start from the trunk where there is one alone."""
    for name, value in finite(weights):
        copies = [name] if weights.is_whole else [name, name.replace("base.", "momentum.", 1)]
        for copy in copies:
            local(tensors[f"model.{copy}"]).copy_(value)
