"""Where each image lies in a tar, so that it can be read in any order without unpacking.

The index is kept next to the tar as `<tar>.index`, or in the user's cache folder if that place cannot be written.
It holds arrays only (npz, no pickle) and is built again whenever the tar's size or its time has changed, or one of the
images' headers, of which some are compared.

Shapes: N images in the tar.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.contents import spread
from engine.data.decode import is_image_name
from engine.data.paths import Names
from engine.errors import UserError, one_line, reason
from engine.files import draft, publish
from engine.logger import warn

_FORMAT = 2
_HEADERS = 16  # that a saved index is compared with, spread over the tar: another one may have its size and time
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_OPEN = 64  # file descriptors that one process holds open


class TarIndex(NamedTuple):
    """The images of one tar in the order they lie in: path inside it, place of the data and its length in bytes."""

    names: Names
    offsets_N: np.ndarray
    sizes_N: np.ndarray


class TarReader:
    """Reads by position from a tar, on a descriptor opened at first use.

    `os.pread` moves no file position, so forked workers that inherit a descriptor do not disturb each other.
    """

    def __init__(self):
        self._open: dict[str, int] = {}

    def read(self, tar: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`. Raises OSError where they are not there."""
        if tar not in self._open:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[tar] = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._open[tar], size, offset)
        if len(data) < size:
            raise OSError(f"{size} bytes expected at byte {offset}, found {len(data)}: the tar was changed")
        return data

    def __getstate__(self) -> dict:
        return {"_open": {}}  # a descriptor means nothing in another process

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)


def open_index(tar: Path, *, read_only: bool = False) -> TarIndex:
    """The tar's index: the saved one if it still fits the tar, else a new one, which is saved unless `read_only`.

    Raises UserError where the tar is compressed, cut short or broken. Saving is atomic and may happen twice at once.
    """
    try:
        status = tar.stat()
        stamp = np.array([_FORMAT, status.st_size, status.st_mtime_ns])
        for path in _places(tar):
            index = _load(path, tar, stamp)
            if index is not None:
                return index
        index = _scan(tar)
    except OSError as error:
        raise UserError(f"tar ({tar}) must be readable; {reason(error)}") from error
    if not read_only:
        _save(index, tar, stamp)
    return index


def _places(tar: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moco-v3-engine"
    return tar.with_name(f"{tar.name}.index"), cache / f"{hashlib.sha256(bytes(tar.resolve())).hexdigest()}.index"


def _load(path: Path, tar: Path, stamp: np.ndarray) -> TarIndex | None:
    try:
        with np.load(path, allow_pickle=False) as saved:
            index = TarIndex(Names(saved["text"], saved["ends"]), saved["offsets"], saved["sizes"])
            fits = np.array_equal(saved["stamp"], stamp) and np.array_equal(saved["headers"], _headers(index, tar))
    except Exception:  # absent or damaged in any way: the tar itself is the truth, and is read again
        return None
    return index if fits else None


def _headers(index: TarIndex, tar: Path) -> np.ndarray:
    """Checksum of the headers of some of the images, each the block before its data."""
    sha256 = hashlib.sha256()
    with tar.open("rb") as file:
        for i in spread(len(index.names), _HEADERS):
            file.seek(int(index.offsets_N[i]) - _BLOCK)
            sha256.update(file.read(_BLOCK))
    return np.frombuffer(sha256.digest(), np.uint8)


def _save(index: TarIndex, tar: Path, stamp: np.ndarray) -> None:
    arrays = {"stamp": stamp, "text": index.names.text_U, "ends": index.names.ends_N}
    arrays |= {"offsets": index.offsets_N, "sizes": index.sizes_N, "headers": _headers(index, tar)}
    for path in _places(tar):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft(path) as place:
                with place.open("xb") as file:
                    np.savez(file, **arrays)
                publish(place, path)
            return
        except OSError:  # the second place may do
            continue
    warn(f"the index of {tar} could not be saved: it is built again at each start")


def _scan(tar: Path) -> TarIndex:
    with tar.open("rb") as file:
        head = file.read(8)
        for magic, kind in _COMPRESSED.items():
            if head.startswith(magic):
                raise UserError(f"tar ({tar}) must not be compressed ({kind}); unpack it to a plain .tar")
        file.seek(0)
        members = list(_members(tar, file))
    names, offsets, sizes = zip(*members, strict=True) if members else ((), (), ())
    return TarIndex(Names.of(names), np.array(offsets, np.int64), np.array(sizes, np.int64))


def _members(path: Path, file) -> Iterator[tuple[bytes, int, int]]:
    """Every image in an open tar. Raises UserError unless the tar ends as a tar must, so that none is lost unseen."""
    tar, end = None, 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep an object per member
            if tar.offset <= end:
                raise ValueError("a member ends before it begins")
            end = tar.offset
            name = _clean(os.fsencode(member.name))
            if member.isreg() and name and is_image_name(name):
                if member.issparse():
                    raise ValueError(f"{member.name} is stored sparse")
                yield name, member.offset_data, member.size
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise _broken(path, f"at byte {tar.offset if tar else 0}: {one_line(error)}") from error
    # tarfile takes a damaged header for the end of the archive. The true end is a block of zeros.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise _broken(path, f"breaks off at byte {end}")


def _broken(tar: Path, where: str) -> UserError:
    return UserError(f"tar ({tar}) must be a whole, plain tar; {where}; fetch or pack it again")


def _clean(name: bytes) -> bytes:
    """The path without `.` and `..`, which is a name here and never a place on disk; empty if hidden."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    return b"" if any(part.startswith(b".") for part in parts) else b"/".join(parts)
