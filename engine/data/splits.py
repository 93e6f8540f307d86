"""The images of a run or an evaluation, opened once for each node, found fit and the same on all of them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from engine.data.began import as_begun, list_of
from engine.data.classes import settle_classes
from engine.data.joined import JoinedSource
from engine.data.opening import align_labels, guess_kind, open_source, open_validation, trained_on
from engine.data.source import Root, Source
from engine.data.subset import take_labels
from engine.distributed.agreement import all_gather
from engine.distributed.world import World, once_per_node
from engine.errors import UserError, escaped
from engine.logger import note, warn
from engine.recipe.load import locate
from engine.recipe.paths import each, expand, named
from engine.recipe.sections import Data, Evaluate, LabelledData, Paths, PretrainData

_LABELLED = {"list": "on each line a label after a tab"}  # how else than by folders


class Splits(NamedTuple):
    """`train` and, where there is one, `val` with labels in train's numbering."""

    train: Source
    val: Source | None


def open_splits(
    data: PretrainData,
    recipe_file: Path,
    world: World,
    *,
    batch: int,
    read_only: bool = False,
    begun: Path | None = None,
) -> Splits:
    """The images of pre-training, labelled or not.

    batch: train.global_batch_size, which they must fill. One rank of each node looks at the files, rank 0 first: it
    alone builds a missing index, which is saved unless `read_only`. begun: the directory of a run in whose count and
    order training images are wanted (engine.data.began).

    Raises:
        UserError: on every rank, where data is missing, differs between ranks, or is less than a batch.
    """

    def find() -> Splits:
        root = _root(data, _located(data.root, recipe_file, "data.root"), "data.root", read_only)
        train = _as_begun(data, begun, "train", open_source(root, "train"))
        if data.val_root is None:
            val = open_source(root, "val")
        else:
            paths = _located(data.val_root, recipe_file, "data.val_root")
            val = open_validation(_root(data, paths, "data.val_root", read_only))
        check_batch(batch, train, named(data.root))
        _warn_of_same(train, val, world)
        return Splits(*settle_classes(data.classes, root, train, val))

    return _open_together(find, world, f"data.root ({named(data.root)})")


def open_labelled_splits(
    data: LabelledData, world: World, *, seed: int, batch: int = 1, begun: Path | None = None
) -> Splits:
    """The labelled images that a recipe names: `open_labelled` of its roots, of which train must fill a batch.

    begun: as `open_splits` has it, for both splits.
    """
    train = _root(data, list(map(expand, each(data.root))), "data.root")
    val = train if data.val_root is None else _root(data, list(map(expand, each(data.val_root))), "data.val_root")
    ordered = partial(_as_begun, data, begun)
    return open_labelled(train, val, world, share=data.labels, seed=seed, batch=batch, ordered=ordered)


def open_labelled_beside(
    evaluate: Evaluate, recipe_file: Path, world: World, *, read_only: bool = False
) -> Splits | None:
    """The labelled images beside training data that pre-training is measured on: `open_labelled` of evaluate's roots,
    of the kind that their files are; None where it names none."""
    train_paths, val_paths = evaluate.train_root, evaluate.val_root
    if train_paths is None or val_paths is None:
        return None

    def root(key: str, paths: Paths) -> Root:
        first, *more = _located(paths, recipe_file, key)
        return Root(guess_kind(first), first, key, read_only=read_only, more=tuple(more))

    return open_labelled(root("evaluate.train_root", train_paths), root("evaluate.val_root", val_paths), world)


def open_labelled(
    train: Root,
    val: Root,
    world: World,
    *,
    share: float = 1.0,
    seed: int = 0,
    batch: int = 1,
    ordered: Callable[[str, Source], Source] = lambda _, source: source,
) -> Splits:
    """Training and validation images with labels in one numbering.

    A root may hold `train` and `val`, of which each side takes its own; else all of it. share: of the training images,
    as many of every class; seed chooses them (engine.data.subset). ordered: gives a split, by its name,
    its order before.

    Raises:
        UserError: on every rank, where images are missing, unlabelled, of a class that is unknown in train, of a single
            class, less than a batch, or not the same on every node.
    """

    def find() -> Splits:
        found = Splits(ordered("train", open_source(train, "train")), ordered("val", open_validation(val)))
        for source, root in zip(found, (train, val), strict=True):
            if source.labels is None:
                raise UserError(
                    f"{root} must hold labelled images, {_LABELLED.get(root.kind, 'a folder for each class')}; "
                    "for images without labels there is `mocov3 evaluate rankme`"
                )
        if len(found.train.classes) < 2:
            raise UserError(f"{train} must hold two classes or more; it has one, {found.train.classes[0]}")
        _warn_of_same(*found, world)
        splits = Splits(take_labels(found.train, share, seed), align_labels(*found))
        check_batch(batch, splits.train, ", ".join(str(part.path) for part in train.each()))
        return splits

    return _open_together(find, world, " and ".join(dict.fromkeys((str(train), str(val)))))


def open_unlabelled(root: Root, world: World) -> Source:
    """The training images of a root, labelled or not. Raises UserError on every rank."""
    return _open_together(lambda: Splits(open_source(root, "train"), None), world, str(root)).train


def open_all(root: Root, world: World) -> Source:
    """Every image of a root; where it holds train and val, both, and names begin so. Raises UserError on every rank."""

    def find() -> Splits:
        train, val = open_source(root, "train"), open_source(root, "val")
        assert train is not None, "only a val split may be missing"
        return Splits(train if val is None else JoinedSource([train, val], ["train", "val"]), None)

    return _open_together(find, world, str(root)).train


def _warn_of_same(train: Source, val: Source | None, world: World) -> None:
    if world.is_first and val is not None and (same := trained_on(train, val)):
        warn(f"{escaped(same)}: the result says nothing of new ones")


def _as_begun(data: Data, begun: Path | None, split: str, source: Source) -> Source:
    return source if begun is None else as_begun(source, list_of(begun, split), data.max_bad_fraction)


def _located(paths: Paths, recipe_file: Path, key: str) -> list[Path]:
    return [locate(path, recipe_file, key) for path in each(paths)]


def _root(data: Data, paths: Sequence[Path], key: str, read_only: bool = False) -> Root:
    first, *more = paths
    return Root(data.source, first, key, data.dataset, data.dataset_options, read_only, tuple(more))


def check_batch(batch: int, train: Source, root: str) -> None:
    """Raises UserError where the training images, which lie in `root`, do not fill a batch."""
    if len(train) < batch:
        raise UserError(
            f"train.global_batch_size ({batch}) must be at most the number of images ({len(train)} in {root}); "
            f"pass train.global_batch_size={len(train)} or less, or give more images"
        )


def _open_together(find: Callable[[], Splits], world: World, name: str) -> Splits:
    """What `find` opens, once for each node; `name` begins the error's line where ranks found different images."""
    splits = once_per_node(world, find)
    mine = tuple((source.fingerprint, source.changes) for source in splits if source is not None)
    fingerprints = all_gather(mine, world.host_group)
    if len(set(fingerprints)) > 1:
        raise UserError(f"{name} must hold the same images on every node; copy them again")
    for line in dict.fromkeys(line for source in splits if source is not None for line in source.notes):
        note(line)
    return splits
