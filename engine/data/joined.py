"""Several sources as one."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from engine.data.jpeg import Jpeg
from engine.data.source import Source


class JoinedSource(Source):
    """Some sources one after the other, with labels where all have them. Classes are the same where names are.

    titles: what tells the images of one from those of another, in names and lines; empty where their names do.
    """

    def __init__(self, parts: Sequence[Source], titles: Sequence[str] = ()):
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])
        self._leads = [f"{title}:" for title in titles] or [""] * len(parts)
        self._own_labels, self.classes = _joined_labels(parts)
        self.labels = self._own_labels
        self.fingerprint = hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()
        ways = {part.by_folder for part in parts}
        self.by_folder = None if None in ways else "deeper" if "deeper" in ways else "directly"
        self.notes = tuple(line for part in parts for line in part.notes)
        self.folders = tuple(folder for part in parts for folder in part.folders)
        unlike = ((lead, part.otherwise) for lead, part in zip(self._leads, parts, strict=True))
        self.otherwise = next((f"{lead}{otherwise}" for lead, otherwise in unlike if otherwise), None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int) -> Image.Image | Jpeg:
        k, inner = self._find(i)
        return self._parts[k].read(inner)

    def content(self, i: int) -> bytes:
        k, inner = self._find(i)
        return self._parts[k].content(inner)

    def file(self, i: int) -> bytes | None:
        k, inner = self._find(i)
        return self._parts[k].file(inner)

    def head(self, i: int, most: int) -> bytes | None:
        k, inner = self._find(i)
        return self._parts[k].head(inner, most)

    def name(self, i: int) -> str:
        k, inner = self._find(i)
        return f"{self._leads[k]}{self._parts[k].name(inner)}"

    def place(self, i: int) -> str:
        k, inner = self._find(i)
        return self._parts[k].place(inner)

    def files(self) -> Iterable[tuple[str, int]] | None:
        found = [part.files() for part in self._parts]
        if any(files is None for files in found):
            return None
        # Numbered: a root may be moved.
        return ((f"root {k}: {name}", size) for k, files in enumerate(found, 1) for name, size in files)

    @property
    def file_numbers(self) -> np.ndarray | None:
        found = [part.file_numbers for part in self._parts]
        known = [number_N for number_N in found if number_N is not None]
        return np.concatenate(known) if len(known) == len(found) else None

    def groups(self) -> Iterable[tuple[str, int, int]]:
        return ((f"root {k}: {name}", *rest) for k, part in enumerate(self._parts, 1) for name, *rest in part.groups())

    def __getstate__(self) -> dict[str, Any]:
        """A copy joins the labels of its parts itself: theirs may lie in a file."""
        own = self.labels is self._own_labels
        return self.__dict__ | {"_own_labels": None, "labels": None if own else self.labels, "_is_own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("_is_own")
        self.__dict__ |= state
        self._own_labels, _ = _joined_labels(self._parts)
        if own:
            self.labels = self._own_labels

    def _find(self, i: int) -> tuple[int, int]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return k, int(i - self._ends[k]) + len(self._parts[k])


def _joined_labels(parts: Sequence[Source]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    if any(part.labels is None for part in parts):
        return None, None
    same = all(part.classes == parts[0].classes for part in parts)
    classes = parts[0].classes if same else tuple(dict.fromkeys(name for part in parts for name in part.classes))
    return np.concatenate([part.labels_among(classes) for part in parts]), classes
