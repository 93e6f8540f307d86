"""Images that are files with a path each, whose first folder is the class.

Shapes: N images, U bytes of text.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from engine.data.decode import decode
from engine.data.labels import by_number
from engine.data.source import Source
from engine.data.survey import printable


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
    """Image files with a path each, whose first folder is the class unless `classes_N` names each image's."""

    labels, classes = None, None

    def __init__(self, names: Names, sizes_N: np.ndarray, classes_N: Names | None = None):
        self._names, self._sizes_N = names, sizes_N
        if classes_N is not None:
            self._label(list(classes_N), by_number)
        elif (folders_N := first_folders(names)) is not None:
            self._label(folders_N, sorted)
        sha256 = hashlib.sha256()  # labels by folder follow from the names
        arrays = [names.text_U, names.ends_N.astype("<i8"), sizes_N.astype("<i8")]
        arrays += [classes_N.text_U, classes_N.ends_N.astype("<i8")] if classes_N is not None else []
        for array in arrays:
            sha256.update(np.ascontiguousarray(array))
        self.fingerprint = sha256.hexdigest()

    def _label(self, class_N: list[bytes], order: Callable[[set[bytes]], list[bytes]]) -> None:
        classes = order(set(class_N))
        number = {name: i for i, name in enumerate(classes)}
        self.labels = np.fromiter((number[name] for name in class_N), np.int64, len(class_N))
        self.classes = tuple(printable(name) for name in classes)

    def __len__(self) -> int:
        return len(self._names)

    @abstractmethod
    def content(self, i: int) -> bytes:
        """The bytes of file i. Raises OSError."""

    def read(self, i: int) -> Image.Image:
        return decode(self.content(i))

    def name(self, i: int) -> str:
        return printable(self._names[i])


def first_folders(names: Names) -> list[bytes] | None:
    """Each image's first folder; None where some image lies in none."""
    parts = [name.partition(b"/") for name in names]
    return [folder for folder, _, _ in parts] if all(slash for _, slash, _ in parts) else None
