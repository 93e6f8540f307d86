"""The kinds of sources, and how one is opened. One more is a file with its opener, and a row here."""

import copy
import os
from collections.abc import Callable, Sequence
from itertools import permutations, product
from pathlib import Path

from engine.data.decode import is_image_name
from engine.data.folder import open_folder
from engine.data.hf import is_hf, open_hf
from engine.data.joined import JoinedSource
from engine.data.lists import LIST_SUFFIXES, open_list
from engine.data.naming import is_tar_name
from engine.data.outputs import lies_among
from engine.data.shards import ShardSource, open_shards
from engine.data.source import Root, Source, Split
from engine.data.torchvision import open_torchvision
from engine.data.twice import in_both, in_several
from engine.errors import UserError, escaped, listed, reason

# What data.source may name (engine.recipe.sections.Data has the same list), and what opens a split of such a root.
OPENERS: dict[str, Callable[[Root, Split], Source | None]] = {
    "folder": open_folder,
    "shards": open_shards,
    "torchvision": open_torchvision,
    "list": open_list,
    "hf": open_hf,
}


_MOST_COMPARED = 4_000_000  # images of several roots: the index of more is not read through


def open_source(root: Root, split: Split) -> Source | None:
    """The images of a split; None for a val split that does not exist.

    A root may hold `train` and `val`; else all of it is training data. Split "all" is everything in the root, but for
    one that holds `train` alone. Of several roots each gives its own. Raises UserError where the data is missing or
    unfit.
    """
    source = _joined(root, [_open(each, split) for each in root.each()])
    if source is not None:
        source.found_in = escaped(listed([str(path.absolute()) for path in root.paths], most=5))
    return source


def open_validation(root: Root) -> Source:
    """The images of a root that is named for validation: its val split where it has one, else all of it.

    Raises UserError as `open_source` does.
    """
    found = _joined(root, [_open(each, "val") or _open(each, "all") for each in root.each()])
    assert found is not None  # of val alone there may be none
    return found


def _joined(root: Root, found: Sequence[Source | None]) -> Source | None:
    """What several roots hold as one source; those that hold nothing of a split are left out."""
    paths = [path.resolve() for path in root.paths]
    if len(set(paths)) < len(paths):
        raise UserError(f"{root} must name each root once; leave out what comes again")
    parts = [(str(path), part) for path, part in zip(root.paths, found, strict=True) if part is not None]
    if len(found) == 1 or not parts:
        return found[0]
    _check_apart(root, parts)
    source = JoinedSource([part for _, part in parts], [title for title, _ in parts])
    numbers = [part.file_numbers for _, part in parts]
    known = [number_N for number_N in numbers if number_N is not None]
    if sum(map(len, known)) <= _MOST_COMPARED and (again := in_several(known)):
        source.notes += (f"{root}: {again} images of one root are another's too, and count again",)
    bare = [title for title, part in parts if part.labels is None]
    if 0 < len(bare) < len(parts):
        source.notes += (f"{root}: the images of {listed(bare, most=5)} have no labels, so none of them is read",)
    return source


def _check_apart(root: Root, parts: Sequence[tuple[str, Source]]) -> None:
    """Raises UserError where the folder of a part lies among the images of another, or two have a tar in common."""
    for (outer, within), (inner, part) in permutations(parts, 2):
        folders = product(within.folders, part.folders)
        if any(lies_among(below / "image", above) for above, below in folders) or _tars(within) & _tars(part):
            raise UserError(f"{root} must hold each image once; {inner} has some that {outer} has: leave out one root")


def _tars(source: Source) -> set[Path]:
    return {tar.resolve() for tar in source.tars} if isinstance(source, ShardSource) else set()


def trained_on(train: Source, val: Source) -> str | None:
    """Which images of val are train's too, in words; None where none is known to be."""
    if train.fingerprint == val.fingerprint:
        return "the images of training and validation are the same"
    if tars := _tars(train) & _tars(val):
        return f"validation images lie in tars that are trained on ({listed(sorted(tar.name for tar in tars), most=3)})"
    if max(len(train), len(val)) > _MOST_COMPARED:
        return None
    one_N, other_N = train.file_numbers, val.file_numbers
    again = 0 if one_N is None or other_N is None else in_both(one_N, other_N)
    return f"{again} of {len(val)} validation images are training images too" if again else None


def _open(root: Root, split: Split) -> Source | None:
    try:
        source = OPENERS[root.kind](root, split)
    except OSError as error:
        if root.path.exists():
            inside = error.filename is not None and os.fsdecode(error.filename) != str(root.path)
            where = f"{os.fsdecode(error.filename)}: " if inside else ""
            raise UserError(f"{root} must be readable; {where}{reason(error)}") from error
        is_option = "." in root.key or root.key.startswith("-")
        do = f"pass {root.key}=/path/to/images" if is_option else "pass another path"
        raise UserError(f"{root} must exist; {do}") from error
    if source is not None:
        source.notes = tuple(map(escaped, source.notes))
    return source


def guess_kind(root: Path) -> str:
    """`list` for a file that is named as a text, `shards` for a tar or a folder with tars in it, whatever lies beside
    them, `hf` where there are tables, else `folder`, which says of a single image what to pass."""
    if root.is_file() and root.suffix.lower() in LIST_SUFFIXES:
        return "list"
    if root.is_dir() and any(is_tar_name(path.name) for path in root.iterdir()):
        return "shards"
    if root.exists() and is_hf(root):
        return "hf"
    return "shards" if root.is_file() and not is_image_name(bytes(root)) else "folder"


def without_labels(source: Source, *notes: str) -> Source:
    """The same images, of no class, with further notes."""
    bare = copy.copy(source)
    bare.labels, bare.classes, bare.notes = None, None, (*source.notes, *notes)
    return bare


def unknown_classes(train: Source, val: Source) -> list[str]:
    """Those of val that train does not have; both have some."""
    known = set(train.classes)
    return [name for name in val.classes if name not in known]


def align_or_drop(train: Source, val: Source) -> Source:
    """`align_labels`; but where all images of a side lie in one folder that the other side lacks, that is no class, and
    `val` is left without labels."""
    if train.classes and val.classes and 1 in (len(train.classes), len(val.classes)):
        unknown = unknown_classes(train, val)
        if unknown:
            known = listed(train.classes, most=5)
            return without_labels(
                val, f"kNN is off: validation classes ({listed(unknown, most=5)}), training's ({known})"
            )
    return align_labels(train, val)


def align_labels(train: Source, val: Source) -> Source:
    """`val` with its labels in the numbering of `train`'s classes, matched by name; unlabelled where either is.

    Raises UserError where val has a class that train does not.
    """
    aligned = without_labels(val)
    if train.labels is None or val.labels is None:
        return aligned
    unknown = unknown_classes(train, val)
    if unknown:
        raise UserError(
            f"validation classes ({listed(unknown, most=5)}) must be among the "
            f"{len(set(train.classes))} classes of the training data; name the folders alike"
        )
    aligned.labels, aligned.classes = val.labels_among(train.classes), train.classes
    return aligned
