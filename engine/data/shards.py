"""Images in tars."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.decode import IMAGE_SUFFIXES, is_image_name
from engine.data.index import TarIndex, TarReader, open_index
from engine.data.naming import are_numbered, class_of_tar, is_tar_name, split_of_tar
from engine.data.paths import FileSource, Names, first_folders
from engine.data.source import Root, Source, Split, part_of
from engine.data.survey import Survey, printable
from engine.errors import UserError, listed


class _Parts(NamedTuple):
    """The tars that are a root's splits; lines about the others; where former rules had other splits."""

    train: list[Path]
    val: list[Path]
    notes: tuple[str, ...] = ()
    otherwise: str | None = None


def open_shards(root: Root, split: Split) -> Source | None:
    """The tars in whose names `train` or `val` is a word. Without train all of it is training data, as one tar is."""
    if root.path.is_file():
        return None if split == "val" else _open(root, [root.path])
    beside = Survey()
    tars = _tars(root.path, beside)
    parts = _parts(root, tars, split)
    chosen = part_of(root, split, parts.train, parts.val, tars)
    if split == "val" and not chosen:
        return None
    if not chosen:
        others = any(is_image_name(bytes(path)) or path.is_dir() for path in root.path.iterdir())
        do = f"; for images in folders pass {root.of_source('folder')}" if others else ""
        raise UserError(f"{root} must hold tars of images ({' '.join(IMAGE_SUFFIXES)}); it has no *.tar{do}")
    source = _open(root, chosen, is_split=bool(parts.train or parts.val))
    found = beside.words()
    source.notes = (*parts.notes, *([f"{root}: left out beside tars: {found}"] if found else []), *source.notes)
    source.otherwise = parts.otherwise or source.otherwise
    return source


def _tars(folder: Path, beside: Survey) -> list[Path]:
    """Its tars; images and folders among the rest, which nobody may miss, go to the survey."""
    found = []
    for path in sorted(folder.iterdir()):
        if is_tar_name(path.name):
            found.append(path)
        elif path.is_dir() and not path.name.startswith("."):
            beside.leave_out("folders")
        elif is_image_name(bytes(path)):
            beside.leave_out_file(bytes(path))
    return found


def _parts(root: Root, tars: list[Path], split: Split) -> _Parts:
    """`train` beside `val` is a split; beside tars of other classes it is a class.

    Raises:
        UserError: it may be either.
    """
    of = {tar: split_of_tar(tar.name) for tar in tars}
    train, val, test = ([tar for tar in tars if of[tar] == name] for name in ("train", "val", "test"))
    others = [tar for tar in tars if of[tar] is None]
    if train and others and not val and not test:
        if not _are_classes(tars, root.read_only):
            names = listed([tar.name for tar in others], most=3)
            raise UserError(
                f"{root} must say whether {train[0].name} is of a split or of a class beside {names}; put what is not "
                f"trained on into another folder, or pass {root.key}=TAR for one tar alone"
            )
        notes = (f"{root}: {train[0].name} is a class, as the tars beside it; for a split there is no val",)
        train, others = [], []
    elif train and split != "all" and (left := others + test):
        notes = (f"{root}: left out beside {'train and val' if val else 'train'}: {listed([p.name for p in left])}",)
    else:
        notes = ()
    now = {**dict.fromkeys(train, "train"), **dict.fromkeys(val, "val")}
    former = {tar: next((name for name in ("train", "val") if tar.name.startswith(name)), None) for tar in tars}
    other = next((tar.name for tar in tars if former[tar] != now.get(tar)), None)
    return _Parts(train, val, notes, other and f"{other} (a word of a tar's name says its split)")


def _are_classes(tars: Sequence[Path], read_only: bool) -> bool:
    """Whether each tar holds one class: its images lie in no folder, or in one that no other tar has."""
    if are_numbered(tar.name for tar in tars):
        return False
    indexes = [open_index(tar, read_only=read_only) for tar in tars]
    folders = [set(first_folders(index.names) or ()) for index in indexes]
    if not any(folders):
        return all(map(_is_flat, indexes))
    return all(len(found) == 1 for found in folders) and len(set.union(*folders)) == len(folders)


def _is_flat(index: TarIndex) -> bool:
    return not any(b"/" in name for name in index.names)


def _open(root: Root, tars: Sequence[Path], *, is_split: bool = False) -> "ShardSource":
    source = ShardSource(tars, read_only=root.read_only, is_split=is_split)
    found = source.survey.words()
    where = f"{tars[0].name}{' and others' if len(tars) > 1 else ''}"
    if not len(source):
        do = "; unpack the tars inside, each a class" if source.survey.left_out[".tar"] else ""
        found = f"its tars have none{f', but {found}' if found else ''}{do}"
        raise UserError(f"{root} must hold tars of images ({' '.join(IMAGE_SUFFIXES)}); {found}")
    notes = [f"left out in {where}: {found}"] if found else []
    source.notes = tuple(
        f"{root}: {line}" for line in (*notes, *([source.about_labels] if source.about_labels else []))
    )
    return source


class ShardSource(FileSource):
    """All image files in some tars, one tar after the other, read in place.

    is_split: the tars' names say which split they are of, which is no part of a class's name. about_labels: how the
    images come by their labels, where that must be said.
    """

    about_labels: str | None = None

    def __init__(self, tars: Sequence[Path], *, read_only: bool = False, is_split: bool = False):
        indexes = [open_index(tar, read_only=read_only) for tar in tars]
        names = Names.joined(index.names for index in indexes)
        self.survey = Survey()
        for tar, index in zip(tars, indexes, strict=True):
            self.survey.add(index.survey, tar.name)
        self.otherwise = self.survey.rule_in_words()
        super().__init__(
            names, np.concatenate([index.sizes_N for index in indexes]), self._classes(tars, indexes, is_split)
        )
        self._offsets_N = np.concatenate([index.offsets_N for index in indexes])
        self._tar_ends = np.cumsum([len(index.names) for index in indexes])
        self._tars, self._reader = tars, TarReader()

    def content(self, i: int) -> bytes:
        return self._reader.read(str(self._tar(i)), int(self._offsets_N[i]), int(self._sizes_N[i]))

    def name(self, i: int) -> str:
        return f"{self._tar(i).name}:{super().name(i)}"

    def _tar(self, i: int) -> Path:
        return self._tars[np.searchsorted(self._tar_ends, i, side="right")]

    def _classes(self, tars: Sequence[Path], indexes: Sequence[TarIndex], is_split: bool) -> Names | None:
        """The class of each image as files beside them or the tars' names say it; None where their folders do."""
        labels = Names.joined(index.labels for index in indexes)
        lacking = sum(not label for label in labels)
        if lacking < len(labels):
            if not lacking:
                return labels
            self.about_labels = f"{lacking} of {len(labels)} images have no label beside them, so none of them is read"
        if len(tars) == 1 or not len(labels) or not all(map(_is_flat, indexes)):
            return None
        if are_numbered(tar.name for tar in tars):
            self.about_labels = self.about_labels or "the tars are numbered and have no folders: unlabelled"
            return None
        names = [os.fsencode(class_of_tar(tar.name, is_split=is_split)) for tar in tars]
        shown = listed([printable(name) for name in names], most=3)
        self.about_labels = f"each tar is a class, as none has folders: {shown}"
        self.otherwise = f"{tars[0].name} (a tar without folders is a class)"
        return Names.of(name for name, index in zip(names, indexes, strict=True) for _ in index.names)
