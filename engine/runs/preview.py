"""What a run of pre-training would be, and would say when it begins, in words that a recipe may hold as comments."""

from pathlib import Path

from torch import nn

from engine.data.splits import open_splits
from engine.distributed.world import World
from engine.errors import UserError
from engine.recipe.load import dump, locate, located
from engine.recipe.paths import each
from engine.recipe.sections import Pretrain
from engine.runs.auto import on_this_machine, settled
from engine.runs.changes import begun, readable
from engine.runs.fits import memory_planned
from engine.runs.monitor import open_watched
from engine.runs.pretrain import Pretraining, make_moco, step_gib
from engine.runs.starting import open_first
from models.moco import MoCo


def preview(recipe: Pretrain, recipe_file: Path, world: World, ranks: int = 1) -> str:
    """The recipe with every key, and as comments what follows from it: sizes, and what a run says when it begins.

    Writes and fetches nothing; where images are missing, a comment says so. Raises UserError for what a run would
    refuse.

    ranks: of the run, where these are not here.
    """
    written, recipe = recipe, settled(recipe, world)
    moco = make_moco(recipe)
    open_first(recipe, recipe_file, world, fetch=False)
    memory = memory_planned(written, max(ranks, world.size), step_gib)
    opening = _opening(recipe, recipe_file, world, moco)
    lines = [_sizes(moco), *memory, *on_this_machine(written, recipe, world), *opening]
    return "\n".join([dump(located(written, recipe_file)), *(f"# {line}" for line in lines)])


def _sizes(moco: MoCo) -> str:
    def count(part: nn.Module) -> str:
        return f"{sum(p.numel() for p in part.parameters()) / 1e6:,.1f} M"

    base = moco.base
    heads = f"projector {count(base.projector)}, predictor {count(moco.predictor)}"
    return f"networks  trunk {count(base.trunk)} parameters, features of width {moco.width}; {heads}"


def _opening(recipe: Pretrain, recipe_file: Path, world: World, moco: MoCo) -> list[str]:
    batch = recipe.train.global_batch_size
    try:
        former = begun(recipe, world)
        splits = open_splits(recipe.data, recipe_file, world, batch=batch, read_only=True, begun=former)
        splits = readable(splits, recipe, world, batch=batch)
        watched = open_watched(recipe, recipe_file, world, splits, read_only=True)
        return Pretraining(recipe, recipe_file, world, splits, watched, moco).opening()
    except UserError as error:
        if all(locate(root, recipe_file).exists() for root in each(recipe.data.root)):
            raise
        return [f"data      {error}", f"schedule  {recipe.train.epochs} epochs, whose steps follow from the images"]
