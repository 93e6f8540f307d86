"""Images in a folder."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data import twice
from engine.data.collect import Collector
from engine.data.decode import IMAGE_SUFFIXES, is_image_name, is_new_suffix
from engine.data.listing import SUFFIX, open_listing
from engine.data.names import Names
from engine.data.naming import called, is_system_folder, is_tar_name
from engine.data.outputs import holds_run
from engine.data.paths import FileSource, first_bytes
from engine.data.source import Root, Source, Split, part_of
from engine.data.survey import NO_FILES, Survey
from engine.data.unchanged import Timed, Times, append_times, is_unchanged, list_settled, times_of
from engine.errors import UserError, listed

_BATCH = 1 << 14  # images
_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_MOST_VISITS = 100  # of one folder, by links: ten that lead to each other would be entered millions of times


class _Parts(NamedTuple):
    """The folders that are a root's splits, and lines about what else lies there."""

    train: Path | None
    val: Path | None
    notes: tuple[str, ...] = ()
    otherwise: str | None = None


def open_folder(root: Root, split: Split) -> Source | None:
    """The folder `train` or `val` in the root; without `train` all of it is training data."""
    if root.path.is_file() and is_tar_name(root.path.name):
        raise UserError(f"{root} must be a folder of images, and is a tar; pass {root.of_source('shards')}")
    if root.path.is_file():
        raise UserError(f"{root} must be a folder of images; {_instead(root)}")
    parts = _parts(root, split)
    folder = part_of(root, split, parts.train, parts.val, root.path)
    if folder is None:
        return None
    source = FolderSource(folder, read_only=root.read_only)
    if not len(source):
        raise _no_images(root, folder, source.survey)
    found = source.survey.words()
    notes = [f"{root}: left out in {folder}: {found}"] if found else []
    if source.again:
        notes.append(f"{root}: {source.again} images in {folder} are others again, by links, and count again")
    source.notes = (*parts.notes, *notes)
    source.otherwise = parts.otherwise or source.otherwise
    return source


def _instead(root: Root) -> str:
    """What to do where the root is a file."""
    if is_image_name(bytes(root.path)):
        return f"this is one of them: pass the folder that it lies in, {root.path.parent}"
    if root.path.suffix.lower() in _ARCHIVES:
        return "unpack the archive, and pass the folder that comes of it"
    return f"for a text file of paths pass {root.of_source('list')}"


def _no_images(root: Root, folder: Path, survey: Survey) -> UserError:
    others = {".tar": "shards", ".parquet": "hf", ".arrow": "hf"}
    hints = {suffix: f"; pass {root.of_source(kind)}" for suffix, kind in others.items()}
    hints |= dict.fromkeys(_ARCHIVES, "; unpack the archives")
    do = next((hint for suffix, hint in hints.items() if survey.left_out[suffix]), "")
    found = survey.words()
    return UserError(
        f"{root} must hold images ({' '.join(IMAGE_SUFFIXES)}); {folder} has none{f', but {found}' if found else ''}"
        f"{do}"
    )


def _parts(root: Root, split: Split) -> _Parts:
    """`train` beside `val` is a split, beside other folders of images a class.

    Raises:
        UserError: it may be either.
    """
    folders = {path.name: path for path in _folders_in(root.path)}
    train, val, test = (_called(folders, part) for part in ("train", "val", "test"))
    if train is None or (val is None and {train, test} != {*folders.values()}):
        train, val = folders.get("train"), folders.get("val")  # other words are classes, unless both are there
    train, val = (None if path is None or holds_run(path) else path for path in (train, val))
    if train is None:
        return _Parts(None, val)
    tests = {path.name for path in folders.values() if path.name.lower() in called("test")}
    others = [path for path in folders.values() if path not in (train, val)]
    if val is None and not tests:
        others = [path for path in others if not holds_run(path) and next(_walk(path, Survey()), None)]
        if others:
            return _as_classes(root, train, others)
    images = 0 if split == "all" else _images_in(root.path)
    names = [*(path.name for path in others), *([f"{images} images in no folder"] if images else [])]
    beside = " and ".join(path.name for path in (train, val) if path)
    notes = (f"{root}: left out beside {beside}: {listed(names)}",) if names and split != "all" else ()
    usual = ((val, "val", "validation"), (train, "train", "training"))
    odd = [f"{path.name}/ (it is the {split} split)" for path, name, split in usual if path and path.name != name]
    return _Parts(train, val, notes, odd[0] if odd else None)


def _called(folders: dict[str, Path], split: str) -> Path | None:
    """The folder that is called as the split is: in small letters and by its usual name, where there is a choice."""
    names = [name for word in called(split) for name in (word, *sorted(folders)) if name.lower() == word]
    return next((folders[name] for name in names if name in folders), None)


def _as_classes(root: Root, train: Path, others: list[Path]) -> _Parts:
    """No split: `train` is a class as the folders beside it are."""
    names = listed([path.name for path in others], most=5)
    if any(_has_folders_of_images(path) for path in (train, *others)):
        raise UserError(
            f"{root} must say whether train is a split or a class beside {names}; to train on it alone pass "
            f"{root.key}={train}, to make it a class give it another name"
        )
    notes = (f"{root}: train is a class, as {names} beside it; to train on it alone pass {root.key}={train}",)
    return _Parts(None, None, notes, f"{others[0].name}/ (train beside other classes is a class)")


def _has_folders_of_images(folder: Path) -> bool:
    return any(next(_walk(path, Survey()), None) for path in _folders_in(folder))


def _folders_in(folder: Path) -> list[Path]:
    """Those that may hold images, links to such too. No file beside them is looked at: there may be millions."""
    with os.scandir(folder) as entries:
        visible = [e for e in entries if not e.name.startswith(".") and not is_system_folder(e.name)]
    return sorted(Path(e.path) for e in visible if (Path(e.path) if e.is_symlink() else e).is_dir())


def _images_in(folder: Path) -> int:
    """How many lie in it, by their names, and not in a folder inside."""
    with os.scandir(folder) as entries:
        visible = [e for e in entries if not e.name.startswith(".") and is_image_name(os.fsencode(e.name))]
    return sum(not e.is_dir(follow_symlinks=False) for e in visible)


class FolderSource(FileSource):
    """All image files below a folder, in the order of their paths. again: how many of them lead to one before."""

    def __init__(self, root: Path, *, read_only: bool = False):
        make = partial(list_settled, root, partial(_list, root))
        listing = open_listing(root, partial(is_unchanged, root), make, read_only=read_only)
        super().__init__(listing)
        self._root, self.folders = root, (root,)
        self.again: int = listing.facts["again"]

    def content(self, i: int) -> bytes:
        return Path(self.place(i)).read_bytes()

    def place(self, i: int) -> str:
        return str(self._root / os.fsdecode(self.path(i)))

    def head(self, i: int, most: int) -> bytes:
        return first_bytes(Path(self.place(i)), most)


# ---- the listing -----------------------------------------------------------------------------------------------------


def _list(root: Path) -> Timed:
    """All images below a folder, and the times of all folders in it."""
    survey, collector, times = Survey(), Collector(), {}
    files = _walk(root, survey, times)
    while batch := list(islice(files, _BATCH)):
        sizes_N = np.array([-1 if status is None else status.st_size for _, status in batch], np.int64)
        collector.append("lost", np.flatnonzero(sizes_N < 0) + collector.images)
        collector.append(twice.COLUMN, np.fromiter((twice.number_of(status) for _, status in batch), np.int64))
        collector.add(Names.of(name for name, _ in batch), sizes_N)
    time_F2 = append_times(collector, times)
    again = twice.again(partial(collector.chunks, twice.COLUMN), collector.images)
    return *collector.finish(collector.label_by_folder(), survey, again=again), time_F2


def _walk(
    root: Path, survey: Survey, times: dict[bytes, Times] | None = None
) -> Iterator[tuple[bytes, os.stat_result | None]]:
    """Path below root and status of every image file except hidden ones, in the order of paths; links are followed.
    times: takes those of every folder, before it is looked into.

    A link that leads nowhere counts as an image without a status, so that it is reported when it is read. What else
    there is goes to the survey. Raises UserError where links multiply folders.
    """
    todo: list[tuple[os.DirEntry[bytes], bytes, frozenset]] = []
    visits = Counter[tuple[int, int]]()

    def enter(path: bytes, name: bytes, status: os.stat_result, above: frozenset) -> None:
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder that it lies in would never end
            return
        visits[identity] += 1
        if visits[identity] > _MOST_VISITS:
            raise UserError(
                f"folder ({root / os.fsdecode(name)}) must not be reached by more than {_MOST_VISITS} ways; links "
                "between folders lead there again and again: remove some"
            )
        if times is not None:
            times[name] = times_of(path)
        prefix = name + b"/" if name else b""
        todo.extend((entry, prefix + entry.name, above | {identity}) for entry in _entries(path, prefix, survey))

    enter(os.fsencode(root), b"", root.stat(), frozenset())
    while todo:
        entry, name, above = todo.pop()
        try:
            status = entry.stat()
        except OSError:
            status = None
        if status and stat.S_ISDIR(status.st_mode):
            if holds_run(entry.path):
                survey.leave_out("folders that hold a run")
                survey.takes_otherwise(name, "a folder that holds a run holds no images of the set")
            else:
                enter(entry.path, name, status, above)
        elif status and not stat.S_ISREG(status.st_mode):
            survey.leave_out(NO_FILES)
        elif is_image_name(name):
            if is_new_suffix(name):
                survey.takes_otherwise(name, "its suffix counts as an image's")
            yield name, status
        elif not name.endswith(SUFFIX.encode()):
            survey.leave_out_file(name)


def _entries(folder: bytes, prefix: bytes, survey: Survey) -> list[os.DirEntry[bytes]]:
    """What in a folder may be or hold images, the last first."""
    visible = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                survey.leave_out("hidden")
            elif is_system_folder(os.fsdecode(entry.name)):
                survey.leave_out(entry.name.decode())
                survey.takes_otherwise(prefix + entry.name, "a system's own folder holds no images of the set")
            else:
                visible.append(entry)
    return sorted(visible, key=_in_paths, reverse=True)


def _in_paths(entry: os.DirEntry[bytes]) -> bytes:
    """How the paths of what it is begin: those in a folder `a` come after `a.png`."""
    try:
        return entry.name + b"/" if entry.is_dir() else entry.name
    except OSError:  # a link to itself
        return entry.name
