"""Where images come from: a folder, tars ("shards") or a torchvision dataset, all read by number.

Shapes: N images.
"""

import copy
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.decode import IMAGE_SUFFIXES, decode, is_image_name
from engine.data.index import Names, TarReader, open_index
from engine.data.source import Source, Split
from engine.data.torchvision_source import open_torchvision
from engine.errors import UserError

_TAR = re.compile(r"[^.].*\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz)")


def open_source(
    kind: str,
    root: Path,
    split: Split,
    *,
    dataset: str | None = None,
    dataset_options: Mapping[str, Any] | None = None,
    key: str = "data.root",
) -> Source | None:
    """The images of a split; None for a val split that does not exist.

    A root may hold `train` and `val` (folders, or `train*.tar` and `val*.tar`); else all of it is training data.
    Split "all" takes everything in the root. The first folder of an image's path is its class. `dataset` and
    `dataset_options` are for torchvision. Raises UserError, which calls the root `key`, where the data is missing.
    """
    if kind == "torchvision":
        return open_torchvision(root, split, dataset, dict(dataset_options or {}), key)
    if kind not in ("folder", "shards"):
        raise UserError(f"data.source ({kind}) must be folder, shards or torchvision; change it")
    try:
        return (_open_folder if kind == "folder" else _open_shards)(root, split, key)
    except OSError as error:
        if root.exists():
            raise UserError(f"{key} ({root}) must be readable; {error.strerror or error}") from error
        raise UserError(f"{key} ({root}) must exist; pass {key}=/path/to/images") from error


def guess_kind(root: Path) -> str:
    """`shards` for a tar or a folder with tars in it, else `folder`."""
    return "shards" if root.is_file() or (root.is_dir() and any(root.glob("[!.]*.tar"))) else "folder"


def align_labels(train: Source, val: Source) -> Source:
    """`val` with its labels in the numbering of `train`'s classes, matched by name; unlabelled where either is.

    Raises UserError where val has a class that train does not.
    """
    aligned = copy.copy(val)
    aligned.labels, aligned.classes = None, None
    if train.labels is None or val.labels is None:
        return aligned
    known = set(train.classes)
    unknown = [name for name in val.classes if name not in known]
    if unknown:
        raise UserError(
            f"validation classes ({', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}) must be among the "
            f"{len(known)} classes of the training data; name the folders alike"
        )
    aligned.labels, aligned.classes = val.labels_among(train.classes), train.classes
    return aligned


# ---- folder and shards -----------------------------------------------------------------------------------------------


class _Files(Source):
    """Image files with a path each, whose first folder is the class."""

    def __init__(self, names: Names, sizes_N: np.ndarray):
        self._names, self._sizes_N = names, sizes_N
        self.labels, self.classes = _classes_of(names)
        sha256 = hashlib.sha256()  # the labels follow from the names
        for array in (names.text_U, names.ends_N.astype("<i8"), sizes_N.astype("<i8")):
            sha256.update(np.ascontiguousarray(array))
        self.fingerprint = sha256.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return _printable(self._names[i])


class FolderSource(_Files):
    """All image files below a folder, in the order of their paths."""

    def __init__(self, root: Path):
        files = sorted(_walk(os.fsencode(root)))
        super().__init__(Names.of(name for name, _ in files), np.array([size for _, size in files], np.int64))
        self._root = os.fsencode(root)

    def read(self, i: int) -> Image.Image:
        with open(os.path.join(self._root, self._names[i]), "rb") as file:
            return decode(file.read())


class ShardSource(_Files):
    """All image files in some tars, one tar after the other, read in place."""

    def __init__(self, tars: Sequence[Path]):
        indexes = [open_index(tar) for tar in tars]
        names = Names.joined(index.names for index in indexes)
        super().__init__(names, np.concatenate([index.sizes_N for index in indexes]))
        self._offsets_N = np.concatenate([index.offsets_N for index in indexes])
        self._tar_ends = np.cumsum([len(index.names) for index in indexes])
        self._tars, self._reader = tars, TarReader()

    def read(self, i: int) -> Image.Image:
        return decode(self._reader.read(str(self._tar(i)), int(self._offsets_N[i]), int(self._sizes_N[i])))

    def name(self, i: int) -> str:
        return f"{self._tar(i).name}:{super().name(i)}"

    def _tar(self, i: int) -> Path:
        return self._tars[np.searchsorted(self._tar_ends, i, side="right")]


def _open_folder(root: Path, split: Split, key: str) -> FolderSource | None:
    train, val = root / "train", root / "val"
    if split == "train" and val.is_dir() and not train.is_dir():
        raise UserError(f"{key} ({root}) must hold the folder train beside val; add it")
    if split == "val" and not val.is_dir():
        os.stat(root)
        return None
    chosen = root / split if split != "all" and train.is_dir() else root
    chosen = val if split == "val" else chosen
    source = FolderSource(chosen)
    if not len(source):
        raise UserError(f"{key} ({root}) must hold images ({' '.join(IMAGE_SUFFIXES)}); {chosen} has none")
    return source


def _open_shards(root: Path, split: Split, key: str) -> ShardSource | None:
    tars = [root] if root.is_file() else sorted(path for path in root.iterdir() if _TAR.fullmatch(path.name))
    train = [tar for tar in tars if tar.name.startswith("train")]
    val = [tar for tar in tars if tar.name.startswith("val")]
    if root.is_file():
        chosen = [] if split == "val" else tars
    elif split == "train" and val and not train:
        raise UserError(f"{key} ({root}) must hold train*.tar beside val*.tar; add them")
    else:
        chosen = {"train": train or tars, "val": val, "all": tars}[split]
    if split == "val" and not chosen:
        return None
    source = ShardSource(chosen) if chosen else None
    if not source or not len(source):
        lack = "its tars have none" if chosen else "it has no *.tar"
        raise UserError(f"{key} ({root}) must hold tars of images ({' '.join(IMAGE_SUFFIXES)}); {lack}")
    return source


def _walk(root: bytes) -> Iterator[tuple[bytes, int]]:
    """Path below root and size in bytes of every image file, hidden ones apart; links are followed.

    A link that leads nowhere counts as an image of size -1, so that it is reported when it is read.
    """
    status = os.stat(root)
    todo = [(root, b"", frozenset([(status.st_dev, status.st_ino)]))]
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


def _classes_of(names: Names) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """(labels, classes) by first folder, classes sorted; (None, None) where some image lies in none."""
    parts = [name.partition(b"/") for name in names]
    if not all(slash for _, slash, _ in parts):
        return None, None
    classes = sorted({folder for folder, _, _ in parts})
    number = {folder: i for i, folder in enumerate(classes)}
    labels_N = np.fromiter((number[folder] for folder, _, _ in parts), np.int64, len(parts))
    return labels_N, tuple(_printable(folder) for folder in classes)


def _printable(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]
