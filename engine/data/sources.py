"""Where images come from: a folder, tars ("shards") or a torchvision dataset, all read by number.

Shapes: N images.
"""

import copy
import difflib
import hashlib
import inspect
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torchvision.datasets
from PIL import Image

from engine.data.decode import IMAGE_SUFFIXES, decode, is_image_name, to_rgb
from engine.data.index import Names, TarReader, open_index
from engine.recipe import UserError
from engine.schema import one_line

Split = Literal["train", "val", "all"]

_TAR = re.compile(r"[^.].*\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz)")
# What torchvision's datasets call the two splits, in order of preference.
_TORCHVISION_SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}
_TORCHVISION_LABELS = ("targets", "labels", "_labels", "_samples")
_FAKE_VAL_OFFSET = 10**9


class Source(ABC):
    """Images by number, 0 to N-1, the same on every node that holds the same data.

    labels: int64 [N], or None where images have no class; classes: their names. fingerprint: a sha256, equal where
    the data is.
    """

    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> Image.Image:
        """Image i as RGB. Raises any Exception where it cannot be read."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What messages call image i."""


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
        return _open_torchvision(root, split, dataset, dict(dataset_options or {}), key)
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
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in val.classes if name not in number]
    if unknown:
        raise UserError(
            f"validation classes ({', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}) must be among the "
            f"{len(number)} classes of the training data; name the folders alike"
        )
    aligned.labels = np.array([number[name] for name in val.classes], np.int64)[val.labels]
    aligned.classes = train.classes
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


# ---- torchvision -----------------------------------------------------------------------------------------------------


class TorchvisionSource(Source):
    """A torchvision dataset, as it lies on disk."""

    def __init__(self, dataset: torchvision.datasets.VisionDataset, identity: str):
        self._dataset = dataset
        self.labels, self.classes = _torchvision_labels(dataset)
        labels = b"" if self.labels is None else self.labels.astype("<i8").tobytes()
        self.fingerprint = hashlib.sha256(f"{identity} {len(dataset)} ".encode() + labels).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, i: int) -> Image.Image:
        return to_rgb(self._dataset[i][0])

    def name(self, i: int) -> str:
        return f"{type(self._dataset).__name__} {i}"


def _open_torchvision(root: Path, split: Split, name: str | None, options: dict, key: str) -> Source | None:
    if split == "all":
        raise UserError(f"{key} ({root}) must not be given for torchvision, whose datasets have splits of their own")
    cls = _torchvision_class(name)
    accepted = {option for base in cls.__mro__ for option in inspect.signature(base.__init__).parameters}
    fixed = {"root": str(root)} if "root" in inspect.signature(cls).parameters else {}
    if "download" in accepted:
        fixed["download"] = False
    for arguments in _split_arguments(cls, accepted, split, options):
        try:
            dataset = cls(**fixed, **arguments)
        except ValueError as error:  # no such split: the next name may do
            reason = error
        except TypeError as error:
            raise UserError(f"data.dataset_options ({options}) must suit {name}; {one_line(error)}") from error
        except Exception as error:
            raise UserError(f"{key} ({root}) must hold torchvision's {name}; torchvision: {one_line(error)}") from error
        else:
            return TorchvisionSource(dataset, f"{name} {sorted(arguments.items())}")
    if split == "val":
        return None
    raise UserError(f"data.dataset ({name}) must have a training split; {one_line(reason)}")


def _torchvision_class(name: str | None) -> type:
    known = {
        each: cls
        for each, cls in vars(torchvision.datasets).items()
        if isinstance(cls, type) and issubclass(cls, torchvision.datasets.VisionDataset)
    }
    if name in known:
        return known[name]
    lower = {each.lower(): each for each in known}
    nearest = lower[difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0)[0]]
    raise UserError(f"data.dataset ({name}) must be a class of torchvision.datasets; did you mean {nearest}?")


def _split_arguments(cls: type, accepted: set[str], split: str, options: dict) -> list[dict]:
    """Arguments to try in turn. A `train` or `split` in the options is the training split; val never takes it."""
    if cls is torchvision.datasets.FakeData:  # it has no splits: val takes its random images from far away
        offset = options.get("random_offset", 0) + (_FAKE_VAL_OFFSET if split == "val" else 0)
        return [{**options, "random_offset": offset}]
    choice = "train" if "train" in accepted else "split" if "split" in accepted else None
    if split == "train" and (choice is None or choice in options):
        return [options]
    values = {"train": [split == "train"], "split": _TORCHVISION_SPLITS[split], None: []}[choice]
    return [{**options, choice: value} for value in values]


def _torchvision_labels(dataset) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    if isinstance(dataset, torchvision.datasets.FakeData):  # it makes them up as it is read
        found = [dataset[i][1] for i in range(len(dataset))]
    else:
        found = next((getattr(dataset, each) for each in _TORCHVISION_LABELS if hasattr(dataset, each)), ())
        found = found.tolist() if hasattr(found, "tolist") else [x[1] if isinstance(x, tuple) else x for x in found]
    if len(found) != len(dataset) or not all(isinstance(label, int) and label >= 0 for label in found):
        return None, None
    classes = tuple(map(str, getattr(dataset, "classes", ())))
    if len(classes) <= max(found):
        classes = tuple(map(str, range(max(found) + 1)))
    return np.array(found, np.int64), classes
