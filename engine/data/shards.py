"""Images in tars."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.decode import IMAGE_SUFFIXES
from engine.data.index import TarReader, open_index
from engine.data.paths import FileSource, Names
from engine.data.source import Root, Source, Split, part_of
from engine.errors import UserError

_TAR = re.compile(r"[^.].*\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz)")


def open_shards(root: Root, split: Split) -> Source | None:
    """`train*.tar` or `val*.tar` in the root. Without `train*` all of it is training data, as one tar is."""
    one = root.path.is_file()
    tars = [root.path] if one else sorted(path for path in root.path.iterdir() if _TAR.fullmatch(path.name))
    train, val = ([tar for tar in tars if tar.name.startswith(name) and not one] for name in ("train", "val"))
    chosen = part_of(root, split, train, val, tars)
    if split == "val" and not chosen:
        return None
    source = ShardSource(chosen, read_only=root.read_only) if chosen else None
    if not source or not len(source):
        lack = "its tars have none" if chosen else "it has no *.tar"
        raise UserError(f"{root} must hold tars of images ({' '.join(IMAGE_SUFFIXES)}); {lack}")
    return source


class ShardSource(FileSource):
    """All image files in some tars, one tar after the other, read in place."""

    def __init__(self, tars: Sequence[Path], *, read_only: bool = False):
        indexes = [open_index(tar, read_only=read_only) for tar in tars]
        names = Names.joined(index.names for index in indexes)
        super().__init__(names, np.concatenate([index.sizes_N for index in indexes]))
        self._offsets_N = np.concatenate([index.offsets_N for index in indexes])
        self._tar_ends = np.cumsum([len(index.names) for index in indexes])
        self._tars, self._reader = tars, TarReader()

    def content(self, i: int) -> bytes:
        return self._reader.read(str(self._tar(i)), int(self._offsets_N[i]), int(self._sizes_N[i]))

    def name(self, i: int) -> str:
        return f"{self._tar(i).name}:{super().name(i)}"

    def _tar(self, i: int) -> Path:
        return self._tars[np.searchsorted(self._tar_ends, i, side="right")]
