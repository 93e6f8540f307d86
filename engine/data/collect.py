"""A listing in the making: images one after the other, and at the end their classes and fingerprint.

Shapes: N images, C classes.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np

from engine.data.labels import by_number
from engine.data.listing import Columns
from engine.data.names import Names, first_folders
from engine.data.survey import Survey, printable

_IN_MEMORY = 1 << 26  # bytes of an array; a longer one lies in a temporary file
_CHUNK = 1 << 20  # numbers


class Numbering:
    """Names by number, in the order in which they are met."""

    def __init__(self):
        self.number: dict[bytes, int] = {}

    def of(self, names: Iterable[bytes]) -> np.ndarray:
        return np.fromiter((self.number.setdefault(name, len(self.number)) for name in names), np.int64)


class Collector:
    """Names and sizes of images, and whatever else a source keeps of them (engine.data.listing.Listing).

    A column whose name begins with `_` is none of the listing's.
    """

    def __init__(self):
        self.images = 0
        self._columns = defaultdict[str, SpooledTemporaryFile](_new_column)
        self._text = Counter()  # bytes of names so far, by what they are of
        self._folders, self._all_in_folders, self._slashes = Numbering(), True, 0
        self._classes: list[bytes] | None = None  # by label, where they are no folders

    def append(self, column: str, values: np.ndarray) -> None:
        self._columns[column].write(values.tobytes())

    def append_names(self, what: str, names: Names) -> None:
        self.append(f"{what}_text", names.text_U)
        self.append(f"{what}_ends", names.ends_N + self._text[what])
        self._text[what] += len(names.text_U)

    def add(self, names: Names, sizes_N: np.ndarray) -> None:
        """More images; of a size that is not known, -1."""
        self.append_names("name", names)
        self.append("sizes", sizes_N)
        self.images += len(names)
        self._slashes += np.count_nonzero(names.text_U == ord("/"))
        folders = first_folders(names)
        if folders is None:
            self._all_in_folders = False
        else:
            self.append("_folder", self._folders.of(folders))

    def chunks(self, column: str) -> Iterator[np.ndarray]:
        """All numbers of a column, some at a time."""
        file, kind = self._columns[column], np.uint8 if column.endswith("_text") else np.int64
        file.seek(0)
        while data := file.read(_CHUNK * 8):
            yield np.frombuffer(data, kind)

    def at(self, column: str, i: int) -> int:
        """Number i of a column that is complete."""
        file = self._columns[column]
        file.seek(8 * i)
        return int.from_bytes(file.read(8), "little", signed=True)

    def label(
        self,
        numbers: Iterable[np.ndarray],
        names: Iterable[bytes],
        order: Callable[[Iterable[bytes]], list[bytes]] = by_number,
        *,
        by_folder: bool = False,
    ) -> tuple[str, ...]:
        """Give all images classes, and return these; numbers: of each image, in chunks, that of its class among names.

        by_folder: the names of images say it, and so their fingerprint does already.
        """
        names = list(names)
        classes = order(set(names))
        label = {name: i for i, name in enumerate(classes)}
        label_C = np.array([label[name] for name in names], np.int64)
        for number_N in numbers:
            self.append("labels", label_C[number_N])
        self._classes = None if by_folder else classes
        return tuple(printable(name) for name in classes)

    def label_by_folder(self) -> tuple[str, ...] | None:
        """`label`, where the first folder is the class; None where some image lies in none."""
        if not (self.images and self._all_in_folders):
            return None
        return self.label(self.chunks("_folder"), self._folders.number, sorted, by_folder=True)

    def finish(self, classes: tuple[str, ...] | None, survey: Survey, **facts: Any) -> tuple[Columns, dict]:
        """What a listing is made of; classes: those of `label`, None for images without."""
        facts |= {"images": self.images, "classes": classes, "fingerprint": self._fingerprint()}
        by_folder = classes is not None and self._classes is None
        facts["by_folder"] = ("directly" if self._slashes == self.images else "deeper") if by_folder else None
        facts["survey"] = vars(survey)
        return {name: column for name, column in self._columns.items() if not name.startswith("_")}, facts

    def _fingerprint(self) -> str:
        """Of names and sizes, and of each image's class unless that is its folder."""
        sha256 = hashlib.sha256()
        for column in ("name_text", "name_ends", "sizes"):
            for numbers in self.chunks(column):
                sha256.update(numbers)
        if self._classes is not None:
            for label_N in self.chunks("labels"):
                sha256.update(b"".join([self._classes[label] for label in label_N.tolist()]))
            length_C, end = np.array([len(name) for name in self._classes], np.int64), 0
            for label_N in self.chunks("labels"):
                ends_N = np.cumsum(length_C[label_N]) + end
                sha256.update(ends_N)
                end = ends_N[-1]
        return sha256.hexdigest()


def _new_column() -> SpooledTemporaryFile:
    return SpooledTemporaryFile(_IN_MEMORY)
