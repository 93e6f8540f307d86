"""The images of an evaluation, opened and found fit for it before anything is computed."""

from pathlib import Path
from typing import Any

from engine.data.sources import Source, align_labels, open_source
from engine.data.splits import Sources, open_together
from engine.data.subset import take_labels
from engine.distributed.world import World
from engine.errors import UserError
from engine.logger import say_once


def open_labelled(
    train: str,
    val: str,
    world: World,
    *,
    kind: str,
    dataset: str | None = None,
    dataset_options: dict[str, Any] | None = None,
    labels: float = 1.0,
    seed: int = 0,
) -> Sources:
    """Training and validation images with labels in one numbering.

    A root may hold `train` and `val`, of which each side takes its own; else all of it. labels: the share of the
    training images that is taken, as many of every class; seed chooses them (engine.data.subset).

    Raises:
        UserError: on every rank, where images are missing, unlabelled, of a class that is unknown in train, of a single
            class, or not the same on every node.
    """
    options = {"dataset": dataset, "dataset_options": dataset_options}

    def find() -> Sources:
        found = _open(train, "train", kind, "--train", options), _open(val, "val", kind, "--val", options)
        for source, name, root in zip(found, ("--train", "--val"), (train, val), strict=True):
            if source.labels is None:
                raise UserError(
                    f"{name} ({root}) must hold labelled images, a folder for each class; "
                    "for images without labels there is `engine.evaluate rankme`"
                )
        if len(found[0].classes) < 2:
            raise UserError(f"--train ({train}) must hold two classes or more; it has one, {found[0].classes[0]}")
        if found[0].fingerprint == found[1].fingerprint:
            say_once("warning: --train and --val are the same images: the result says nothing of new ones")
        return Sources(take_labels(found[0], labels, seed), align_labels(*found))

    return open_together(find, world, f"--train ({train}) and --val ({val})")


def open_unlabelled(root: str, world: World, *, kind: str, dataset: str | None = None) -> Source:
    """The training images of a root, labelled or not. Raises UserError on every rank."""

    def find() -> Sources:
        return Sources(_open(root, "train", kind, "--data", {"dataset": dataset, "dataset_options": None}), None)

    return open_together(find, world, f"--data ({root})").train


def _open(root: str, split: str, kind: str, name: str, options: dict[str, Any]) -> Source:
    path = Path(root)
    source = open_source(kind, path, split, key=name, **options)
    if source is None and kind == "torchvision":
        raise UserError(f"{name} ({root}) must have a validation split; torchvision's {options['dataset']} has none")
    if source is None and (any(path.glob("train*.tar")) if kind == "shards" else (path / "train").is_dir()):
        raise UserError(f"{name} ({root}) must hold val beside train, or be the validation images' own root; add it")
    return open_source(kind, path, "all", key=name, **options) if source is None else source
