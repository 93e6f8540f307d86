"""What a source of images is.

Shapes: N images.
"""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "val", "all"]


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

    def labels_among(self, classes: tuple[str, ...]) -> np.ndarray:
        """The labels in the numbering of other classes, among which are all of this source's, matched by name."""
        if classes == self.classes:  # by number, as two classes may have one name: ImageNet's cranes
            return self.labels
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[name] for name in self.classes], np.int64)[self.labels]
