"""What a source of images is.

Shapes: N images.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from engine.data.decode import to_rgb
from engine.data.jpeg import Jpeg
from engine.errors import UserError, listed

T = TypeVar("T")

Split = Literal["train", "val", "all"]
ByFolder = Literal["directly", "deeper"]  # all of them; or some of them in folders inside


@dataclass(frozen=True)
class Root:
    """Where images are to be found, before anything is looked at.

    Args:
        kind: which of the sources (engine.data.opening).
        key: what messages call the path.
        dataset: the class of torchvision.datasets, for that source alone; dataset_options: its arguments.
        read_only: nothing is saved beside the images, and nothing fetched.
        more: further paths, whose images follow.
    """

    kind: str
    path: Path
    key: str = "data.root"
    dataset: str | None = None
    dataset_options: Mapping[str, Any] = field(default_factory=dict)
    read_only: bool = False
    more: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.key} ({listed([str(path) for path in self.paths], most=5)})"

    def each(self) -> "list[Root]":
        """A root for each path."""
        return [replace(self, path=path, more=()) for path in self.paths]

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path, *self.more)

    def of_source(self, kind: str) -> str:
        """What to pass where the images are of another kind."""
        return f"data.source={kind}" if "." in self.key else f"--source {kind}"


def part_of(root: Root, split: Split, train: T, val: T, everything: T) -> T:
    """What makes up a split of a root that holds `everything`, and some of it under the names `train` and `val` (each
    falsy where there is none): without `train` all of it is training data.

    Raises:
        UserError: one of the two is missing, and the other must not stand for it.
    """
    if split == "train" and val and not train:
        raise UserError(f"{root} must hold train beside val; add it")
    if split == "all" and train and not val:
        raise UserError(f"{root} must hold val beside train, or be the validation images' own root; add it")
    return {"train": train or everything, "val": val, "all": everything}[split]


class Source(ABC):
    """Images by number, 0 to N-1, the same on every node that holds the same data.

    labels: int64 [N], or None where images have no class; classes: their names. fingerprint: a sha256, equal where
    the data is. found_in: the roots that it was opened at, in words. notes: what is to be said of it, a line each.
    otherwise: the first file that former rules took for something else, and the rule that does (engine.data.rules);
    None where there is none. folders: those of which every image file is one of the set, also one that is written
    later. by_folder: where first folders are the classes, how images lie in them; None where something else says the
    classes, or nothing. changes: how it differs from what a run began with, in words, where that is accepted
    (engine.data.began). left_out: images of what it is a choice of that cannot be read, by number, each with its name
    and why (engine.data.leaving_out).
    """

    found_in: str = ""
    notes: tuple[str, ...] = ()
    otherwise: str | None = None
    folders: tuple[Path, ...] = ()
    by_folder: ByFolder | None = None
    changes: str | None = None
    left_out: Mapping[int, str] = MappingProxyType({})
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> Image.Image | Jpeg:
        """Image i, whose pixels are read when it is used (engine.data.decode). Raises any Exception where it cannot
        be read."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What messages call image i."""

    def place(self, i: int) -> str:
        """Where image i lies, to be found there: its path, letter by letter as the system's calls take it (of a tar's
        member or a table's row what follows a colon); its name where it lies nowhere."""
        return self.name(i)

    @property
    def file_numbers(self) -> np.ndarray | None:
        """By which each file is known, whatever it is called: int64 [N] (engine.data.twice). None where that is not
        told."""
        return None

    @property
    def whole(self) -> "Source":
        """What it is a choice of; itself where it is none."""
        return self

    def files(self) -> Iterable[tuple[str, int]] | None:
        """Name on one line and size in bytes of every image, wherever the set lies; None where they are no files."""
        return None

    def groups(self) -> Iterable[tuple[str, int, int]]:
        """Name, images and bytes of each tar or folder, where `files` says something."""
        return ()

    def content(self, i: int) -> bytes:
        """What image i is made of: its file, or its pixels where it has none. Raises as `read`."""
        image = to_rgb(self.read(i))
        return f"{image.size} ".encode() + image.tobytes()

    def file(self, i: int) -> bytes | None:
        """The file that image i is; None where it has none. Raises as `read`."""
        return None

    def head(self, i: int, most: int) -> bytes | None:
        """The first bytes of that file, at most so many, for less than the whole costs; None where nothing is less.
        Raises as `read`."""
        return None

    def labels_among(self, classes: tuple[str, ...]) -> np.ndarray:
        """The labels in the numbering of other classes, among which are all of this source's, matched by name."""
        if classes == self.classes:  # by number, as two classes may have one name: ImageNet's cranes
            return self.labels
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[name] for name in self.classes], np.int64)[self.labels]


class Choice(Source):
    """Some images of a source under numbers of their own, which read and are called as they are there."""

    def __init__(self, source: Source):
        self._source = source
        self.classes, self.folders, self.found_in = source.classes, source.folders, source.found_in
        self.notes, self.otherwise, self.changes = source.notes, source.otherwise, source.changes

    @abstractmethod
    def _number(self, i: int) -> int:
        """Of image i in the source."""

    @property
    def whole(self) -> Source:
        return self._source.whole

    def read(self, i: int) -> Image.Image | Jpeg:
        return self._source.read(self._number(i))

    def head(self, i: int, most: int) -> bytes | None:
        return self._source.head(self._number(i), most)

    def content(self, i: int) -> bytes:
        return self._source.content(self._number(i))

    def file(self, i: int) -> bytes | None:
        return self._source.file(self._number(i))

    def name(self, i: int) -> str:
        return self._source.name(self._number(i))

    def place(self, i: int) -> str:
        return self._source.place(self._number(i))
