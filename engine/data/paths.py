"""Images that are files with a path each, whose first folder is the class."""

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.decode import decode
from engine.data.jpeg import Jpeg
from engine.data.listing import Listing
from engine.data.source import Source
from engine.data.survey import Survey, printable
from engine.data.twice import COLUMN


class FileSource(Source):
    """The image files of a listing. survey: what was found beside them."""

    def __init__(self, listing: Listing):
        self._listing = listing
        self.labels, self.classes, self.fingerprint = listing.labels_N, listing.classes, listing.fingerprint
        self.by_folder = listing.by_folder
        self.survey = Survey(**listing.facts["survey"])
        self.otherwise = self.survey.rule_in_words()

    def __len__(self) -> int:
        return len(self._listing)

    @abstractmethod
    def content(self, i: int) -> bytes:
        """The bytes of file i. Raises OSError."""

    @property
    def file_numbers(self) -> np.ndarray | None:
        """None of what is in tars."""
        return self._listing.arrays.get(COLUMN)

    def files(self) -> Iterable[tuple[str, int]]:
        return zip(map(printable, self._listing.names), self._listing.sizes_N.tolist(), strict=True)

    def groups(self) -> Iterable[tuple[str, int, int]]:
        label_N, sizes_N = self._listing.labels_N, self._listing.sizes_N
        if label_N is None or self._listing.classes is None:
            return [("all", len(self), int(sizes_N.sum()))]
        images_C, bytes_C = np.bincount(label_N), np.bincount(label_N, sizes_N)
        return zip(self._listing.classes, images_C.tolist(), map(int, bytes_C), strict=True)

    def file(self, i: int) -> bytes:
        return self.content(i)

    def read(self, i: int) -> Image.Image | Jpeg:
        return decode(self.content(i))

    def path(self, i: int) -> bytes:
        """Where file i is called, below what was listed."""
        return self._listing.names[i]

    def name(self, i: int) -> str:
        return printable(self.path(i))

    def __getstate__(self) -> dict[str, Any]:
        """Labels of the listing's own stay in its file."""
        own = self.labels is self._listing.labels_N
        return self.__dict__ | {"labels": None if own else self.labels, "_own_labels": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("_own_labels")
        self.__dict__ |= state
        if own:
            self.labels = self._listing.labels_N


def first_bytes(path: Path, most: int) -> bytes:
    """Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return file.read(most)
