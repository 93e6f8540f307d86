"""Where each image lies in a tar, so that it can be read in any order without unpacking.

The index is kept next to the tar as `<tar>.index`, or in the user's cache folder if that place cannot be written
or holds another file.
It holds arrays only (npz, no pickle) and is built again whenever the tar's size or its time has changed, or one of the
images' headers, of which some are compared.

Shapes: N images in the tar.
"""

import errno
import hashlib
import json
import os
import resource
import stat
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.contents import spread
from engine.data.listing import may_be_written, places
from engine.data.members import find_images
from engine.data.names import Names
from engine.data.survey import Survey
from engine.errors import UserError, reason
from engine.files import publish, shared_draft
from engine.logger import warn

_FORMAT = 4
_BEGIN = b"PK\3\4"  # of an npz file
_HEADERS = 16  # that a saved index is compared with, spread over the tar: another one may have its size and time
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_TRIES, _PAUSE = 100, 0.001  # to open a tar where descriptors are scarce; seconds between them
_MOST_OPEN = 1 << 16  # descriptors of a reader, however many the process may have


class TarIndex(NamedTuple):
    """The images of one tar in the order they lie in: path inside it, place of the data and its length in bytes; the
    class that a label beside it says, empty where there is none. survey: what else is in the tar."""

    names: Names
    offsets_N: np.ndarray
    sizes_N: np.ndarray
    labels: Names
    survey: Survey


class TarReader:
    """Reads by position from tars, on descriptors that are opened at first use; those least recently used are closed.

    `os.pread` moves no file position, so threads, and forked workers that inherit a descriptor, do not disturb each
    other; one that is closed for another tar stays open until who reads from it is done.
    """

    def __init__(self):
        self._opened = lru_cache(_most_open())(_Descriptor)

    def read(self, tar: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`. Raises OSError where they are not there."""
        descriptor = self._descriptor(tar)
        data = os.pread(descriptor.number, size, offset)
        if len(data) < size:
            raise OSError(f"{size} bytes expected at byte {offset}, found {len(data)}: the tar was changed")
        return data

    def _descriptor(self, tar: str) -> "_Descriptor":
        for _ in range(_TRIES):
            try:
                return self._opened(tar)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                # Others have opened what this one counted on, and may be quicker to open what it gives back.
                self._opened.cache_clear()
                time.sleep(_PAUSE)
        return self._opened(tar)

    def __reduce__(self) -> tuple:
        return TarReader, ()  # a descriptor means nothing in another process


class _Descriptor:
    """An open file, as long as somebody holds this."""

    number = -1

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


def _most_open() -> int:
    """A quarter of the descriptors that this process may have: other sources, sockets and logs need theirs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, limit // 4))


def open_index(tar: Path, *, read_only: bool = False) -> TarIndex:
    """The tar's index: the saved one if it still fits the tar, else a new one, which is saved unless `read_only`.

    Raises UserError where the tar is compressed, cut short or broken. Saving is atomic and may happen twice at once.
    """
    try:
        status = tar.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise UserError(f"tar ({tar}) must be a file; it is a folder, a pipe or a device: take it away")
        stamp = np.array([_FORMAT, status.st_size, status.st_mtime_ns])
        for path in places(tar):
            index = _load(path, tar, stamp)
            if index is not None:
                return index
        index = _scan(tar)
    except OSError as error:
        raise UserError(f"tar ({tar}) must be readable; {reason(error)}") from error
    if not read_only:
        _save(index, tar, stamp)
    return index


def _load(path: Path, tar: Path, stamp: np.ndarray) -> TarIndex | None:
    try:
        with np.load(path, allow_pickle=False) as saved:
            names, labels = (Names(saved[f"{what}_text"], saved[f"{what}_ends"]) for what in ("name", "label"))
            survey = Survey(**json.loads(saved["survey"].tobytes()))
            index = TarIndex(names, saved["offsets"], saved["sizes"], labels, survey)
            fits = np.array_equal(saved["stamp"], stamp) and np.array_equal(saved["headers"], _headers(index, tar))
    except Exception:  # absent or damaged in any way: the tar itself is the truth, and is read again
        return None
    return index if fits else None


def _headers(index: TarIndex, tar: Path) -> np.ndarray:
    chosen = spread(len(index.names), _HEADERS)
    return np.frombuffer(checksum_of_headers((str(tar), int(index.offsets_N[i])) for i in chosen), np.uint8)


def checksum_of_headers(images: Iterable[tuple[str, int]]) -> bytes:
    """SHA-256 of the headers of images by tar and offset, each the block before its data. Raises OSError."""
    sha256, reader = hashlib.sha256(), TarReader()
    for tar, offset in images:
        sha256.update(reader.read(tar, max(0, offset - _BLOCK), _BLOCK))
    return sha256.digest()


def _save(index: TarIndex, tar: Path, stamp: np.ndarray) -> None:
    arrays = {"stamp": stamp, "headers": _headers(index, tar), "offsets": index.offsets_N, "sizes": index.sizes_N}
    arrays["survey"] = np.frombuffer(json.dumps(vars(index.survey)).encode(), np.uint8)
    for what, texts in (("name", index.names), ("label", index.labels)):
        arrays |= {f"{what}_text": texts.text_U, f"{what}_ends": texts.ends_N}
    for path in places(tar):
        try:
            if not may_be_written(path, _BEGIN):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with shared_draft(path) as place:
                with place.open("wb") as file:
                    np.savez(file, **arrays)
                publish(place, path)
            return
        except OSError:  # the second place may do
            continue
    warn(f"the index of {tar} could not be saved: it is built again at each start")


def _scan(tar: Path) -> TarIndex:
    survey = Survey()
    with tar.open("rb") as file:
        head = file.read(8)
        for magic, kind in _COMPRESSED.items():
            if head.startswith(magic):
                raise UserError(f"tar ({tar}) must not be compressed ({kind}); unpack it to a plain .tar")
        images = find_images(tar, file, survey)
    return TarIndex(
        Names.of(image.at.name for image in images),
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
        Names.of(image.label for image in images),
        survey,
    )
