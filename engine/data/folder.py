"""Images in a folder."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.data.decode import IMAGE_SUFFIXES, is_image_name
from engine.data.paths import FileSource, Names
from engine.data.source import Root, Source, Split, part_of
from engine.errors import UserError


def open_folder(root: Root, split: Split) -> Source | None:
    """The folder `train` or `val` in the root; without `train` all of it is training data."""
    root.path.stat()  # a root that is not there is no root without val
    train, val = (path if path.is_dir() else None for path in (root.path / "train", root.path / "val"))
    folder = part_of(root, split, train, val, root.path)
    if folder is None:
        return None
    source = FolderSource(folder)
    if not len(source):
        raise UserError(f"{root} must hold images ({' '.join(IMAGE_SUFFIXES)}); {folder} has none")
    return source


class FolderSource(FileSource):
    """All image files below a folder, in the order of their paths."""

    def __init__(self, root: Path):
        files = sorted(_walk(root))
        super().__init__(Names.of(name for name, _ in files), np.array([size for _, size in files], np.int64))
        self._root = root

    def content(self, i: int) -> bytes:
        return (self._root / os.fsdecode(self._names[i])).read_bytes()


def _walk(root: Path) -> Iterator[tuple[bytes, int]]:
    """Path below root and size in bytes of every image file except hidden ones; links are followed.

    A link that leads nowhere counts as an image of size -1, so that it is reported when it is read.
    """
    status = root.stat()
    todo = [(os.fsencode(root), b"", frozenset([(status.st_dev, status.st_ino)]))]
    while todo:
        folder, prefix, above = todo.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                try:
                    status = entry.stat()
                except OSError:
                    status = None
                if status and stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    if identity not in above:  # a link to a folder that it lies in would never end
                        todo.append((entry.path, prefix + entry.name + b"/", above | {identity}))
                elif is_image_name(entry.name) and (status is None or stat.S_ISREG(status.st_mode)):
                    yield prefix + entry.name, status.st_size if status else -1
