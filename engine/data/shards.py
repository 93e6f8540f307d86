"""Images in tars."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.collect import Collector, Numbering
from engine.data.contents import spread
from engine.data.decode import IMAGE_SUFFIXES, is_image_name
from engine.data.index import TarIndex, TarReader, checksum_of_headers, open_index
from engine.data.listing import SUFFIX, Columns, Listing, open_listing, places
from engine.data.names import Names, first_folders
from engine.data.naming import are_numbered, class_of_tar, is_part_of_tar, is_tar_name, split_of_tar
from engine.data.paths import FileSource
from engine.data.rules import RULES
from engine.data.source import Root, Source, Split, part_of
from engine.data.survey import Survey, printable
from engine.errors import UserError, escaped, listed
from engine.files import sweep

_PLACE = ".tars"  # their index has a name that no folder beside them, which they may be packed of, gives its own
_HEADERS = 64  # of images, spread over all tars, that a saved listing is compared with


class _Parts(NamedTuple):
    """The tars that are a root's splits; lines about the others; where former rules had other splits."""

    train: list[Path]
    val: list[Path]
    notes: tuple[str, ...] = ()
    otherwise: str | None = None


def open_shards(root: Root, split: Split) -> Source | None:
    """The tars in whose names `train` or `val` is a word. Without train all of it is training data, as one tar is."""
    if root.path.is_file():
        return None if split == "val" else _open(root, split, [root.path])
    beside = Survey()
    tars = _tars(root.path, beside)
    parts = _parts(root, tars, split)
    chosen = part_of(root, split, parts.train, parts.val, tars)
    if split == "val" and not chosen:
        return None
    if not chosen:
        raise UserError(
            f"{root} must hold tars of images ({' '.join(IMAGE_SUFFIXES)}); it has no *.tar{_instead(root)}"
        )
    source = _open(root, split, chosen, is_split=bool(parts.train or parts.val))
    found = beside.words()
    source.notes = (*parts.notes, *([f"{root}: left out beside tars: {found}"] if found else []), *source.notes)
    source.otherwise = parts.otherwise or source.otherwise
    return source


def _instead(root: Root) -> str:
    """What to do where the root holds no tars."""
    inside = sorted(root.path.iterdir())
    folders = [path for path in inside if path.is_dir()]
    of_tars = [path for path in folders if any(is_tar_name(each.name) for each in path.iterdir())]
    if of_tars:
        return f"; pass a folder that does, such as {root.key}={of_tars[0]}"
    others = folders or any(is_image_name(bytes(path)) for path in inside)
    return f"; for images in folders pass {root.of_source('folder')}" if others else ""


def _tars(folder: Path, beside: Survey) -> list[Path]:
    """Its tars; of the rest images, folders and tars that are not all there yet go to the survey."""
    found = []
    for path in sorted(folder.iterdir()):
        if is_tar_name(path.name):
            found.append(path)
        elif path.is_dir() and not path.name.startswith("."):
            beside.leave_out("folders")
        elif is_image_name(bytes(path)) or is_part_of_tar(path.name):
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
    indexes = (open_index(tar, read_only=read_only) for tar in tars)
    folders, flat = zip(*[(set(first_folders(index.names) or ()), _is_flat(index)) for index in indexes], strict=True)
    if not any(folders):
        return all(flat)
    return all(len(found) == 1 for found in folders) and len(set.union(*folders)) == len(folders)


def _is_flat(index: TarIndex) -> bool:
    return not (index.names.text_U == ord("/")).any()


def _open(root: Root, split: Split, tars: Sequence[Path], *, is_split: bool = False) -> "ShardSource":
    place = root.path.with_suffix(_PLACE) if root.path.is_file() else root.path / (split + _PLACE)
    source = ShardSource(tars, place, read_only=root.read_only, is_split=is_split)
    found = source.survey.words()
    where = f"{tars[0].name}{' and others' if len(tars) > 1 else ''}"
    if not len(source):
        do = "; unpack the tars inside, each a class" if source.survey.left_out[".tar"] else ""
        found = f"its tars have none{f', but {found}' if found else ''}{do}"
        raise UserError(f"{root} must hold tars of images ({' '.join(IMAGE_SUFFIXES)}); {found}")
    notes = [f"left out in {where}: {found}"] if found else []
    if again := _linked(tars):
        notes.append(f"a tar again, by a link, and its images count again: {listed(again, most=5)}")
    source.notes = tuple(
        f"{root}: {line}" for line in (*notes, *([source.about_labels] if source.about_labels else []))
    )
    return source


def _linked(tars: Sequence[Path]) -> list[str]:
    """Tars that are others, in words."""
    first: dict[tuple[int, int], str] = {}
    statuses = ((tar.name, tar.stat()) for tar in tars)
    found = ((name, first.setdefault((status.st_dev, status.st_ino), name)) for name, status in statuses)
    return [f"{name} is {other}" for name, other in found if name != other]


class ShardSource(FileSource):
    """All image files in some tars of one folder, one tar after the other, read in place.

    place: what their index is named for. is_split: the tars' names say which split they are of, which is no part of a
    class's name. about_labels: how the images come by their labels, where that must be said.
    """

    def __init__(self, tars: Sequence[Path], place: Path, *, read_only: bool = False, is_split: bool = False):
        fits, make = partial(_is_as_listed, tars, is_split), partial(_list, tars, is_split, read_only)
        listing = open_listing(place, fits, make, read_only=read_only)
        super().__init__(listing)
        self.about_labels: str | None = listing.facts["about_labels"]
        self.otherwise = listing.facts["otherwise"] or self.otherwise
        self._folder, self._reader = tars[0].parent, TarReader()

    def content(self, i: int) -> bytes:
        return self.head(i, int(self._listing.sizes_N[i]))

    def head(self, i: int, most: int) -> bytes:
        size = min(most, int(self._listing.sizes_N[i]))
        return self._reader.read(str(self._folder / self._tar(i)), int(self._listing.arrays["offsets"][i]), size)

    def name(self, i: int) -> str:
        return f"{escaped(self._tar(i))}:{super().name(i)}"

    def place(self, i: int) -> str:
        return f"{self._folder / self._tar(i)}:{os.fsdecode(self.path(i))}"

    def files(self) -> Iterable[tuple[str, int]]:
        tars = chain.from_iterable(repeat(tar, images) for tar, images, _ in self.groups())
        return ((f"{tar}:{name}", size) for tar, (name, size) in zip(tars, super().files(), strict=True))

    def groups(self) -> Iterator[tuple[str, int, int]]:
        begin, sizes_N = 0, self._listing.sizes_N
        for tar, end in zip(self._listing.names_of("tar"), self._listing.arrays["tar_images"].tolist(), strict=True):
            yield printable(tar), end - begin, int(sizes_N[begin:end].sum())
            begin = end

    @property
    def tars(self) -> Iterator[Path]:
        return (self._folder / os.fsdecode(name) for name in self._listing.names_of("tar"))

    def _tar(self, i: int) -> str:
        k = np.searchsorted(self._listing.arrays["tar_images"], i, side="right")
        return os.fsdecode(self._listing.names_of("tar")[k])


# ---- the listing -----------------------------------------------------------------------------------------------------


class _Tally(NamedTuple):
    """Of each tar: its images, those without a label beside them, whether none of them lies in a folder."""

    images_T: list[int]
    lacking_T: list[int]
    flat_T: list[bool]


def _list(tars: Sequence[Path], is_split: bool, read_only: bool) -> tuple[Columns, dict]:
    """All images in the tars, of which one index after the other is in memory."""
    stamp = _stamp(tars, is_split)
    for place in () if read_only else places(tars[0]):
        sweep(place.parent, SUFFIX)
    collector, labels, survey, tally = Collector(), Numbering(), Survey(), _Tally([], [], [])
    for tar in tars:
        index = open_index(tar, read_only=read_only)
        collector.add(index.names, index.sizes_N)
        collector.append("offsets", index.offsets_N)
        collector.append("_label", labels.of(index.labels))
        survey.add(index.survey, tar.name)
        tally.images_T.append(len(index.names))
        tally.lacking_T.append(int((np.diff(index.labels.ends_N, prepend=0) == 0).sum()))
        tally.flat_T.append(_is_flat(index))
    collector.append_names("tar", Names.of(os.fsencode(tar.name) for tar in tars))
    ends_T = np.cumsum(tally.images_T)
    collector.append("tar_images", ends_T)
    headers = _headers(tars, ends_T, partial(collector.at, "offsets"))
    classes, facts = _label(collector, tars, is_split, labels, tally)
    return collector.finish(classes, survey, stamp=stamp, headers=headers, **facts)


def _label(
    collector: Collector, tars: Sequence[Path], is_split: bool, labels: Numbering, tally: _Tally
) -> tuple[tuple[str, ...] | None, dict[str, str | None]]:
    """The classes as files beside the images, the tars' names or else folders say them; what is to be said of it."""
    images, lacking = collector.images, sum(tally.lacking_T)
    facts: dict[str, str | None] = {"about_labels": None, "otherwise": None}
    if lacking < images:
        if not lacking:
            return collector.label(collector.chunks("_label"), labels.number), facts
        facts["about_labels"] = f"{lacking} of {images} images have no label beside them, so none of them is read"
    if len(tars) == 1 or not images or not all(tally.flat_T):
        return collector.label_by_folder(), facts
    if are_numbered(tar.name for tar in tars):
        facts["about_labels"] = facts["about_labels"] or "the tars are numbered and have no folders: unlabelled"
        return None, facts
    names = [os.fsencode(class_of_tar(tar.name, is_split=is_split)) for tar in tars]
    shown = listed([printable(name) for name in names], most=3)
    facts["about_labels"] = f"each tar is a class, as none has folders: {shown}"
    facts["otherwise"] = f"{tars[0].name} (a tar without folders is a class)"
    filled = [(name, count) for name, count in zip(names, tally.images_T, strict=True) if count]
    numbers = (np.full(count, number) for number, (_, count) in enumerate(filled))
    return collector.label(numbers, [name for name, _ in filled]), facts


def _is_as_listed(tars: Sequence[Path], is_split: bool, listing: Listing) -> bool:
    """Whether the tars are the same ones, by their times and sizes, and hold what was listed where it is looked at."""
    stamp = listing.facts.get("stamp")  # another kind's listing has none
    if stamp is None or stamp != _stamp(tars, is_split):
        return False
    offsets_N, ends_T = listing.arrays["offsets"], listing.arrays["tar_images"]
    try:
        return listing.facts["headers"] == _headers(tars, ends_T, lambda i: int(offsets_N[i]))
    except OSError:
        return False


def _headers(tars: Sequence[Path], ends_T: np.ndarray, offset_of: Callable[[int], int]) -> str:
    """A checksum of the headers of images spread over all tars."""
    chosen = spread(int(ends_T[-1]), _HEADERS)
    tar_of = np.searchsorted(ends_T, chosen, side="right")
    return checksum_of_headers((str(tars[t]), offset_of(i)) for t, i in zip(tar_of.tolist(), chosen, strict=True)).hex()


def _stamp(tars: Sequence[Path], is_split: bool) -> str | None:
    """What the listing of tars depends on; None where one cannot be found."""
    try:
        of_tars = [(tar.name, status.st_size, status.st_mtime_ns) for tar in tars for status in [tar.stat()]]
    except OSError:
        return None
    return hashlib.sha256(json.dumps([RULES, is_split, of_tars]).encode()).hexdigest()
