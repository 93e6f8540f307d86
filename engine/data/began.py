"""The images that a run began with, listed in its directory: what is not as it was is named, and may be accepted.

Shapes: N images that the run began with, M images that there are now.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import compress, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.data.bad_images import bears, least_fraction
from engine.data.jpeg import Jpeg
from engine.data.source import Source
from engine.errors import UserError, listed, reason
from engine.files import draft, publish
from engine.logger import warn

MOST = 10**7  # images that are listed one by one
_NAMED = 3  # images in a line about differences
_LEVEL = 1  # of compression: names are alike, and higher levels take many times as long for a third less


class Began(NamedTuple):
    """What a run began with: fingerprint, sizes in bytes and names of its images, labels and classes if it had any.

    grouped: of tars or folders, not images; their labels are numbers of images.
    """

    fingerprint: str
    sizes_N: np.ndarray
    names: list[str]
    labels_N: np.ndarray | None
    classes: tuple[str, ...] | None
    grouped: bool = False


class Changes(NamedTuple):
    """What images are not as they were.

    place_N: the present number of each image that there was, -1 where it is gone. differ: numbers of those that have
    another size; relabelled: of those with another label. added: names of those that there were not.
    """

    place_N: np.ndarray
    differ: list[int]
    relabelled: list[int]
    added: list[str]

    @property
    def gone(self) -> list[int]:
        return np.flatnonzero(self.place_N < 0).tolist()

    def in_words(self, began: Began) -> str:
        """The first of each kind, and how many there are."""
        numbers = {"gone": self.gone, "of another size": self.differ, "of another label": self.relabelled}
        kinds = {what: [began.names[i] for i in some] for what, some in numbers.items()} | {"new": self.added}
        found = [f"{len(names):,} {what} ({listed(names, most=_NAMED)})" for what, names in kinds.items() if names]
        return ", ".join(found) or "their order or classes differ"


# ---- the list --------------------------------------------------------------------------------------------------------


def list_of(directory: Path, split: str) -> Path:
    """Where a run lists the images of a split."""
    return directory / f"images_{split}.tsv.gz"


def write_began(source: Source, path: Path) -> None:
    """List the images of a source, or where there are too many its tars or folders, unless that is done or they are no
    files.

    A list that cannot be written is said and no more: it is for days that may not come.
    """
    if _written_of(path) == source.fingerprint or (files := source.files()) is None:
        return
    try:
        with draft(path) as unfinished:
            with gzip.open(unfinished, "wt", _LEVEL, encoding="utf-8", newline="\n") as file:
                file.writelines(_lines(source, files if len(source) <= MOST else None))
            publish(unfinished, path)
    except OSError as error:
        warn(f"{path} could not be written ({reason(error)}): if an image changes later, it cannot be named")


def read_began(path: Path) -> Began | None:
    """The list; None where there is none, or it is damaged, which is said."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            head = json.loads(next(file))
            rows = [line.rstrip("\n").split("\t", 2) for line in file]
            sizes_N, labels_N = (np.array([int(row[k]) for row in rows], np.int64) for k in (0, 1))
            names = [row[2] for row in rows]
            classes = None if head["classes"] is None else tuple(head["classes"])
            has_labels = classes is not None or head["grouped"]
            return Began(
                head["fingerprint"], sizes_N, names, labels_N if has_labels else None, classes, head["grouped"]
            )
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a torn file makes of zip, JSON and numbers
        warn(f"{path} is damaged ({reason(error)}): what images have changed cannot be told")
        return None


def _written_of(path: Path) -> str | None:
    """The fingerprint of what a list is of."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return json.loads(next(file))["fingerprint"]
    except Exception:  # absent or damaged: it is written again
        return None


def _lines(source: Source, files: Iterable[tuple[str, int]] | None) -> Iterator[str]:
    """files: None for groups."""
    yield json.dumps({"fingerprint": source.fingerprint, "classes": source.classes, "grouped": files is None}) + "\n"
    if files is None:
        yield from (f"{size}\t{images}\t{name}\n" for name, images, size in source.groups())
        return
    labels = repeat(-1) if source.labels is None else source.labels
    yield from (f"{size}\t{label}\t{name}\n" for (name, size), label in zip(files, labels, strict=False))


# ---- what is not as it was -------------------------------------------------------------------------------------------


def changes_in_words(source: Source, path: Path) -> str | None:
    """What is not as the list at `path` says; None where it does not say anything of it."""
    began = read_began(path)
    if began is not None and began.grouped:
        return _other_groups(began, source)
    changes = began and compare(began, source)
    return changes.in_words(began) if began and changes else None


def _other_groups(began: Began, source: Source) -> str:
    rows = zip(began.names, began.labels_N.tolist(), began.sizes_N.tolist(), strict=True)
    before, now = ({name: rest for name, *rest in each} for each in (rows, source.groups()))
    other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return f"other images in {listed(other, most=_NAMED)}" if other else "other names or labels"


def compare(began: Began, source: Source) -> Changes | None:
    """What differs in a source; None where its images are no files."""
    files = source.files()
    if files is None:
        return None
    number, sizes = {}, []
    for i, (name, size) in enumerate(_told_apart(files)):
        number[name] = i
        sizes.append(size)
    there = _told_apart(zip(began.names, began.sizes_N.tolist(), strict=True))
    place_N = np.fromiter((number.get(name, -1) for name, _ in there), np.int64, len(began.names))
    still = np.flatnonzero(place_N >= 0)
    differ = still[np.array(sizes, np.int64)[place_N[still]] != began.sizes_N[still]]
    is_new_M = np.ones(len(sizes), bool)
    is_new_M[place_N[still]] = False
    added = [name.partition("\n")[0] for name in compress(number, is_new_M)]
    return Changes(place_N, differ.tolist(), _relabelled(began, source, place_N), added)


def _relabelled(began: Began, source: Source, place_N: np.ndarray) -> list[int]:
    """Numbers of images that have another label than they had."""
    if began.labels_N is None or began.classes is None or source.labels is None:
        return []
    number = {name: i for i, name in enumerate(began.classes)}
    label_C = np.array([number.get(name, -1) for name in source.classes], np.int64)
    still = np.flatnonzero(place_N >= 0)
    return still[label_C[source.labels[place_N[still]]] != began.labels_N[still]].tolist()


def _told_apart(files: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The same, with a number at a name that came before: two tars, or lines of a list, may have one."""
    count: dict[str, int] = {}
    for name, size in files:
        count[name] = count.get(name, 0) + 1
        yield (name if count[name] == 1 else f"{name}\n{count[name]}"), size


def as_begun(source: Source, path: Path, bearable: float) -> Source:
    """The source with the count and order of images that the run which keeps the list began with.

    bearable: the share of them that may be gone.

    Raises:
        UserError: more are gone, or they have other labels.
    """
    began = read_began(path)
    if began is None or began.grouped or began.fingerprint == source.fingerprint:
        return source
    changes = compare(began, source)
    if changes is None:
        return source
    if not bears(bearable, len(changes.gone), len(began.names)):
        least = least_fraction(len(changes.gone), len(began.names))
        raise UserError(
            f"data.max_bad_fraction ({bearable}) must bear what is gone of the images that the run began with: "
            f"{changes.in_words(began)}; give it those, or pass data.max_bad_fraction={least:g} or more"
        )
    return AsBegun(source, began, changes)


class AsBegun(Source):
    """A source in the count and order of what a run began with: what is gone cannot be read, what is new is left out.

    changes: what differs, in words.
    """

    def __init__(self, source: Source, began: Began, changes: Changes):
        self._source, self._place_N = source, changes.place_N
        self._gone = {i: began.names[i] for i in changes.gone}
        self.fingerprint, self.labels, self.classes = began.fingerprint, began.labels_N, began.classes
        self.by_folder = None if began.labels_N is None else source.by_folder
        self.changes = changes.in_words(began)
        self.notes, self.otherwise, self.folders = source.notes, source.otherwise, source.folders
        self.found_in = source.found_in
        if other := changes.relabelled:
            raise UserError(
                f"data.accept_changes (true) must not change labels: {len(other):,} images have others than the run "
                f"began with, such as {began.names[other[0]]}; give it those, or pass another run.dir"
            )

    def __len__(self) -> int:
        return len(self._place_N)

    def read(self, i: int) -> Image.Image | Jpeg:
        return self._source.read(self._present(i))

    def content(self, i: int) -> bytes:
        return self._source.content(self._present(i))

    def name(self, i: int) -> str:
        return self._gone[i] if i in self._gone else self._source.name(self._present(i))

    def _present(self, i: int) -> int:
        if i in self._gone:
            raise FileNotFoundError("it is gone since the run began")
        return int(self._place_N[i])
