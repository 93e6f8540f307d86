"""Images that are files with a path each, whose first folder is the class.

Shapes: N images, U bytes of text.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from engine.data.decode import decode
from engine.data.source import Source


class Names:
    """Many names in two arrays. A list of a million strings would be copied, page by page, into every forked worker:
    merely looking at a string writes its reference count."""

    def __init__(self, text_U: np.ndarray, ends_N: np.ndarray):
        self.text_U, self.ends_N = text_U, ends_N

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        names = list(names)
        lengths_N = np.fromiter((len(name) for name in names), np.int64, len(names))
        return cls(np.frombuffer(b"".join(names), np.uint8), np.cumsum(lengths_N))

    @classmethod
    def joined(cls, parts: Iterable["Names"]) -> "Names":
        return cls.of(name for part in parts for name in part)

    def __len__(self) -> int:
        return len(self.ends_N)

    def __getitem__(self, i: int) -> bytes:
        start = self.ends_N[i - 1] if i else 0
        return self.text_U[start : self.ends_N[i]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        text, start = self.text_U.tobytes(), 0
        for end in self.ends_N.tolist():
            yield text[start:end]
            start = end


class FileSource(Source):
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

    @abstractmethod
    def content(self, i: int) -> bytes:
        """The bytes of file i. Raises OSError."""

    def read(self, i: int) -> Image.Image:
        return decode(self.content(i))

    def name(self, i: int) -> str:
        return _printable(self._names[i])


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
