"""Many names in two arrays.

Shapes: N names, U bytes of text.
"""

from collections.abc import Iterable, Iterator

import numpy as np


class Names:
    """Names one after the other, and where each ends. A list of a million strings would be copied, page by page, into
    every forked worker: merely looking at a string writes its reference count."""

    def __init__(self, text_U: np.ndarray, ends_N: np.ndarray):
        self.text_U, self.ends_N = text_U, ends_N

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        names = list(names)
        lengths_N = np.fromiter((len(name) for name in names), np.int64, len(names))
        return cls(np.frombuffer(b"".join(names), np.uint8), np.cumsum(lengths_N))

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


def first_folders(names: Iterable[bytes]) -> list[bytes] | None:
    """Each image's first folder; None where some image lies in none."""
    parts = [name.partition(b"/") for name in names]
    return [folder for folder, _, _ in parts] if all(slash for _, slash, _ in parts) else None
