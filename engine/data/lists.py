"""Images that a text file names: a path a line, relative to the file; after a tab a label, if there is one."""

import codecs
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from engine.data import twice
from engine.data.collect import Collector, Numbering
from engine.data.decode import IMAGE_SUFFIXES, is_image_name
from engine.data.labels import read_label
from engine.data.listing import Listing, open_listing
from engine.data.names import Names
from engine.data.paths import FileSource, first_bytes
from engine.data.source import Root, Source, Split
from engine.data.survey import NO_FILES, Survey, printable
from engine.data.unchanged import Timed, Times, append_times, is_unchanged, list_settled, times_of
from engine.errors import UserError

LIST_SUFFIXES = (".txt", ".tsv", ".lst", ".list")  # by which a list is known; it may have others
_LONGEST = 1 << 16  # bytes of a line: more is no path
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_list(root: Root, split: Split) -> Source | None:
    """All that the file names: it has no splits, and validation images have a list of their own."""
    if split == "val":
        return None
    if root.path.exists() and not root.path.is_file():
        raise UserError(
            f"{root} must be a text file of paths; for the images in a folder pass {root.of_source('folder')}"
        )
    make = partial(list_settled, root.path, partial(_list, root))
    listing = open_listing(root.path, partial(_is_as_listed, root.path), make, read_only=root.read_only)
    source = ListSource(root.path.parent, listing)
    source.notes = tuple(f"{root}: {line}" for line in listing.facts["notes"])
    return source


def _list(root: Root) -> Timed:
    """All that the list names, and the times of the folders of that and of the list itself."""
    found, stamp = _Found(root), times_of(root.path)
    for line, path, label in _lines(root):
        found.take(line, path, label)
    columns, facts, time_F2 = found.listed()
    return columns, facts | {"list": stamp}, np.vstack([time_F2, [stamp]])


def _is_as_listed(path: Path, listing: Listing) -> bool:
    same = listing.facts.get("list") == [*times_of(path)]
    return same and is_unchanged(path.parent, listing, os.fsencode(listing.facts["shared"]))


def _lines(root: Root) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, path and label of each line that is not blank; a label is empty where there is none.

    Raises:
        UserError: a line is none of a list.
    """
    with root.path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, _LONGEST), b""), 1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip()
            path, *labels = (part.strip(b" ") for part in text.split(b"\t"))
            if b"\0" in text or len(line) == _LONGEST or (number == 1 and text.startswith(_UTF16)):
                raise UserError(f"{root} must be text in UTF-8, a path on each line; line {number} is something else")
            if text and (not path or len(labels) > 1):
                raise UserError(
                    f"{root} must have a path on each line and at most a tab and a label after it; line {number} is "
                    f"'{printable(text)[:80]}'"
                )
            if text:
                yield number, path, _label(labels[0] if labels else b"")


def _label(text: bytes) -> bytes:
    try:
        text.decode()
    except UnicodeDecodeError:  # a name as good as any: that of a folder may have such letters too
        return text
    return read_label(b"cls", text)


class _Found:
    """The images of a list so far, in its order, and what else it names."""

    def __init__(self, root: Root):
        self.root, self.folder = root, root.path.parent
        self.paths: list[bytes] = []
        self.sizes: list[int] = []
        self.numbers: list[int] = []
        self.labels: list[bytes] = []
        self.times: dict[bytes, Times] = {}
        self.survey = Survey()
        self.first_lost, self.first_left_out = "", ""

    def take(self, line: int, path: bytes, label: bytes) -> None:
        """A line's. A file that is not there counts as an image of size -1, so that it is reported when it is read."""
        inner = path[: path.rfind(b"/") + 1]
        if inner not in self.times:
            self.times[inner] = times_of(self.folder / os.fsdecode(inner))
        try:
            status = (self.folder / os.fsdecode(path)).stat()
        except OSError:
            status = None
        where = f"line {line}: {printable(path)}"
        if is_image_name(path) and (status is None or stat.S_ISREG(status.st_mode)):
            self.paths.append(path)
            self.labels.append(label)
            self.sizes.append(status.st_size if status else -1)
            self.numbers.append(twice.number_of(status))
            self.first_lost = self.first_lost or ("" if status else where)
            return
        self.first_left_out = self.first_left_out or where
        if status and stat.S_ISDIR(status.st_mode):
            self.survey.leave_out("folders")
        elif status and not stat.S_ISREG(status.st_mode):
            self.survey.leave_out(NO_FILES)
        else:
            self.survey.leave_out_file(path)

    def listed(self) -> Timed:
        """Raises UserError where there is no image, or one under two labels."""
        found = self.survey.words()
        left_out = f"{found} ({self.first_left_out})" if found else ""
        if not self.paths:
            raise UserError(
                f"{self.root} must name images ({' '.join(IMAGE_SUFFIXES)}), a path on each line, a label after a tab; "
                f"there are none{f', but {left_out}' if left_out else ''}"
            )
        lost = self.sizes.count(-1)
        if lost == len(self.paths):
            raise UserError(
                f"{self.root} must name images that are there, by paths relative to its folder; none of {lost} is, "
                f"such as {self.first_lost}"
            )
        lacking = self.labels.count(b"")
        again = self._named_again()
        notes = {
            f"left out: {left_out}": left_out,
            f"{lost} of {len(self.paths)} files are not there ({self.first_lost})": lost,
            f"{again} lines name an image again, and it counts again": again,
            f"{lacking} of {len(self.paths)} images have no label, so none of them is read": any(self.labels)
            and lacking,
        }
        shared, collector, labels = _shared_folder(self.paths), Collector(), Numbering()
        sizes_N = np.array(self.sizes, np.int64)
        collector.add(Names.of(path[len(shared) :] for path in self.paths), sizes_N)
        collector.append("lost", np.flatnonzero(sizes_N < 0))
        collector.append(twice.COLUMN, np.array(self.numbers, np.int64))
        classes = None if lacking else collector.label([labels.of(self.labels)], labels.number)
        time_F2 = append_times(collector, self.times)
        facts = {"notes": [line for line, holds in notes.items() if holds], "shared": os.fsdecode(shared)}
        facts["apart"] = self._lies_among_images()
        return *collector.finish(classes, Survey(), **facts), time_F2

    def _lies_among_images(self) -> bool:
        own = os.path.realpath(self.folder)
        return any(os.path.realpath(self.folder / os.fsdecode(inner)) == own for inner in self.times)

    def _named_again(self) -> int:
        """How many lines name a file that one before does, by whatever name. Raises UserError where a path has two
        labels."""
        label_of: dict[bytes, bytes] = {}
        files: set[int | bytes] = set()
        each = zip(map(os.path.normpath, self.paths), self.labels, self.sizes, self.numbers, strict=True)
        for path, label, size, number in each:
            files.add(path if size < 0 else number)
            if label_of.setdefault(path, label) != label:
                both = " and ".join(printable(name) or "none" for name in (label_of[path], label))
                raise UserError(f"{self.root} must give each image one label; {printable(path)} has {both}")
        return len(self.paths) - len(files)


class ListSource(FileSource):
    """Image files by their paths, in the order of the list; no folder is a class.

    The folder that all paths have in common is left out of the fingerprint: a list of absolute paths may be written
    anew where the images have moved.
    """

    def __init__(self, folder: Path, listing: Listing):
        super().__init__(listing)
        self._folder, self._shared = folder, os.fsencode(listing.facts["shared"])

    def content(self, i: int) -> bytes:
        return Path(self.place(i)).read_bytes()

    def place(self, i: int) -> str:
        return str(self._folder / os.fsdecode(self.path(i)))

    def head(self, i: int, most: int) -> bytes:
        return first_bytes(Path(self.place(i)), most)

    def path(self, i: int) -> bytes:
        return self._shared + super().path(i)


def _shared_folder(paths: list[bytes]) -> bytes:
    """How all of them begin, up to a slash."""
    first, last = min(paths), max(paths)  # what these two share, all do
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind(b"/", 0, alike) + 1]
