"""The recipe's images, opened on every rank and found to be the same there."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine.data.sources import Source, align_labels, open_source
from engine.distributed.agreement import gather
from engine.distributed.world import World, in_turn
from engine.errors import UserError
from engine.recipe.load import Pretrain, locate
from engine.recipe.sections import Finetune


class Sources(NamedTuple):
    """`train` and, where there is one, `val` with labels in train's numbering."""

    train: Source
    val: Source | None


def open_sources(recipe: Pretrain, recipe_file: Path, world: World) -> Sources:
    """Open training and validation images; rank 0 first, so that it alone builds an index that is missing.

    Raises:
        UserError: on every rank, where data is missing, differs between ranks, or is less than one batch.
    """

    def find() -> Sources:
        sources = _open(recipe, recipe_file)
        check_batch(recipe, len(sources.train))
        return sources

    return open_together(find, world, f"data.root ({recipe.data.root})")


def open_together(find: Callable[[], Sources], world: World, name: str) -> Sources:
    """What `find` opens, on rank 0 first; `name` begins the UserError's line where ranks found different images."""
    sources = in_turn(world, find)
    fingerprints = gather(tuple(s.fingerprint for s in sources if s is not None), world.host_group)
    if len(set(fingerprints)) > 1:
        raise UserError(f"{name} must hold the same images on every node; copy them anew")
    return sources


def _open(recipe: Pretrain, recipe_file: Path) -> Sources:
    data = recipe.data
    options = {"dataset": data.dataset, "dataset_options": data.dataset_options}
    root = locate(data.root, recipe_file)
    train = open_source(data.source, root, "train", **options)
    if data.val_root is None:
        val = open_source(data.source, root, "val", **options)
    else:
        split = "val" if data.source == "torchvision" else "all"
        val = open_source(data.source, locate(data.val_root, recipe_file), split, key="data.val_root", **options)
    return Sources(train, None if val is None else align_labels(train, val))


def check_batch(recipe: Pretrain | Finetune, images: int) -> None:
    """Raises UserError where the training images do not fill one batch."""
    batch = recipe.train.global_batch_size
    if images < batch:
        raise UserError(
            f"train.global_batch_size ({batch}) must be at most the number of images ({images} in "
            f"{recipe.data.root}); pass train.global_batch_size={images} or less, or give more images"
        )
