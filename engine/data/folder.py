"""Images in a folder."""

import os
import stat
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.collect import Collector
from engine.data.contents import spread
from engine.data.decode import IMAGE_SUFFIXES, is_image_name, is_new_suffix
from engine.data.listing import SUFFIX, Columns, Listing, is_worth_a_file, open_listing
from engine.data.names import Names
from engine.data.naming import called, is_system_folder, is_tar_name
from engine.data.outputs import holds_run
from engine.data.paths import FileSource
from engine.data.rules import RULES
from engine.data.source import Root, Source, Split, part_of
from engine.data.survey import Survey
from engine.errors import UserError, listed
from engine.logger import warn

_BATCH = 1 << 14  # images
_TICK_NS = 2 * 10**9  # of the coarsest clock of a file system
_LOOKED_AT = 256  # files, spread over the folder: one that is written over changes no folder's time

_File = tuple[bytes, int]


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
        raise UserError(f"{root} must be a folder of images; for a text file of paths pass {root.of_source('list')}")
    parts = _parts(root, split)
    folder = part_of(root, split, parts.train, parts.val, root.path)
    if folder is None:
        return None
    source = FolderSource(folder, read_only=root.read_only)
    if not len(source):
        raise _no_images(root, folder, source.survey)
    found = source.survey.words()
    source.notes = (*parts.notes, *([f"{root}: left out in {folder}: {found}"] if found else []))
    source.otherwise = parts.otherwise or source.otherwise
    return source


def _no_images(root: Root, folder: Path, survey: Survey) -> UserError:
    do = f"; pass {root.of_source('shards')}" if survey.left_out[".tar"] else ""
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
    train, val = (_called(folders, part) for part in ("train", "val"))
    if train is None or val is None:  # other words for a split are classes, unless there are both
        train, val = folders.get("train"), folders.get("val")
    train, val = (None if path is None or holds_run(path) else path for path in (train, val))
    if train is None:
        return _Parts(None, val)
    tests = {path.name for path in folders.values() if path.name.lower() in called("test")}
    others = [path for path in folders.values() if path not in (train, val)]
    if val is None and not tests:
        others = [path for path in others if not holds_run(path) and next(_walk(path, Survey()), None)]
        if others:
            return _as_classes(root, train, others)
    names = [path.name for path in others]
    beside = " and ".join(path.name for path in (train, val) if path)
    notes = (f"{root}: left out beside {beside}: {listed(names)}",) if names and split != "all" else ()
    otherwise = None
    if val and val.name != "val":
        otherwise = f"{val.name}/ (it is the validation split)"
    return _Parts(train, val, notes, otherwise)


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


class FolderSource(FileSource):
    """All image files below a folder, in the order of their paths."""

    def __init__(self, root: Path, *, read_only: bool = False):
        listing = open_listing(root, partial(_is_as_listed, root), partial(_list, root), read_only=read_only)
        super().__init__(listing)
        self._root, self.folders = root, (root,)

    def content(self, i: int) -> bytes:
        return (self._root / os.fsdecode(self.path(i))).read_bytes()


# ---- the listing -----------------------------------------------------------------------------------------------------


def _list(root: Path) -> tuple[Columns, dict]:
    """All images below a folder, and the times of all folders in it.

    Where one was changed just now, all of it is listed again: what is changed in the same tick of a clock changes no
    time. settled: whether all times are of use.
    """
    columns, facts, waits = _list_once(root)
    if waits and is_worth_a_file(facts):
        time.sleep(waits / 1e9)
        columns, facts, waits = _list_once(root)
        if waits:
            warn(f"{root} is being changed, or its times are wrong: every rank looks at all its files, at each start")
    return columns, facts | {"settled": not waits}


def _list_once(root: Path) -> tuple[Columns, dict, int]:
    """A listing; and how many nanoseconds it came too soon, or without times."""
    began = time.time_ns()
    survey, collector, folders = Survey(), Collector(), []
    files = _walk(root, survey, folders)
    while batch := list(islice(files, _BATCH)):
        sizes_N = np.array([size for _, size in batch], np.int64)
        collector.append("lost", np.flatnonzero(sizes_N < 0) + collector.images)
        collector.add(Names.of(name for name, _ in batch), sizes_N)
    collector.append_names("folder", Names.of(name for name, _ in folders))
    time_F2 = np.array([times for _, times in folders], np.int64)
    collector.append("folder_times", time_F2)
    columns, facts = collector.finish(collector.label_by_folder(), survey, rules=RULES)
    soon = _TICK_NS - (began - int(time_F2.max())) if time_F2.min() > 0 else _TICK_NS
    return columns, facts, max(0, min(soon, _TICK_NS))


def _is_as_listed(root: Path, listing: Listing) -> bool:
    """Whether no folder has another time; and some of the files, and all that could not be found, are as they were."""
    facts, arrays = listing.facts, listing.arrays
    if facts["rules"] != RULES:
        return False
    try:
        for folder, times in zip(listing.names_of("folder"), arrays["folder_times"].reshape(-1, 2), strict=True):
            if _times((root / os.fsdecode(folder)).stat()) != tuple(times.tolist()):
                return False
    except OSError:
        return False
    files = [*spread(len(listing), _LOOKED_AT), *arrays["lost"].tolist()]
    return all(_size(root / os.fsdecode(listing.names[i])) == listing.sizes_N[i] for i in files)


def _times(status: os.stat_result) -> tuple[int, int]:
    """When a folder's entries changed: the second of the two cannot be set back by who copies it."""
    return status.st_mtime_ns, status.st_ctime_ns


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _walk(root: Path, survey: Survey, folders: list[tuple[bytes, tuple[int, int]]] | None = None) -> Iterator[_File]:
    """Path below root and size in bytes of every image file except hidden ones, in the order of paths; links are
    followed. folders: takes the path and the times of every folder, before it is looked into.

    A link that leads nowhere counts as an image of size -1, so that it is reported when it is read. What else there is
    goes to the survey.
    """
    todo: list[tuple[os.DirEntry[bytes], bytes, frozenset]] = []

    def enter(path: bytes, name: bytes, status: os.stat_result, above: frozenset) -> None:
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder that it lies in would never end
            return
        if folders is not None:
            folders.append((name, _times(status)))
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
        elif is_image_name(name) and (status is None or stat.S_ISREG(status.st_mode)):
            if is_new_suffix(name):
                survey.takes_otherwise(name, "its suffix counts as an image's")
            yield name, status.st_size if status else -1
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
