"""The images of a source of files: names, sizes, labels, in arrays that lie in memory where they are few, and else in a
file, `<what is listed>.index`, which all processes map and none copies.

The file has the form of safetensors: one array after the other behind a header. It is written once, and again where it
does not fit its images any more.

Shapes: N images.
"""

import hashlib
import json
import mmap
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.data.names import Names
from engine.data.source import ByFolder
from engine.files import publish, shared_draft, sweep
from engine.logger import warn

SUFFIX = ".index"
_WORTH_A_FILE = 10_000  # images; fewer are found again at each start
_CHECKED = 1 << 28  # bytes of a file that are compared with their checksum; of a larger one the header alone
_CHUNK = 1 << 24
_ALIGNED = 64  # bytes
_BEGIN = b'{"__metadata__": {"facts":'  # of the header
_TYPES = {"U8": np.dtype(np.uint8), "I64": np.dtype("<i8")}


class Listing:
    """What is known of N images.

    arrays: by name, among them `name_text` and `name_ends` (engine.data.names), `sizes`, and where images have classes
    `labels`, int64 [N]. facts: as JSON has them, among them `fingerprint`, `by_folder` (engine.data.source) and, with
    labels, `classes`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], path: Path | None = None):
        self.arrays, self.facts, self._path = arrays, facts, path
        self.names, self.sizes_N = self.names_of("name"), arrays["sizes"]
        has_labels = facts.get("classes") is not None
        self.labels_N: np.ndarray | None = arrays["labels"] if has_labels else None
        self.classes: tuple[str, ...] | None = tuple(facts["classes"]) if has_labels else None
        self.fingerprint: str = facts["fingerprint"]
        self.by_folder: ByFolder | None = facts["by_folder"]

    def __len__(self) -> int:
        return len(self.names)

    def names_of(self, what: str) -> Names:
        return Names(self.arrays[f"{what}_text"], self.arrays[f"{what}_ends"])

    def __reduce__(self) -> tuple:
        """Another process maps the same file."""
        if self._path is None:
            return Listing, (self.arrays, self.facts)
        return _mapped_again, (self._path, self.facts["id"])


Columns = Mapping[str, IO[bytes]]  # an array each; text as bytes, all others as int64


def open_listing(
    path: Path, fits: Callable[[Listing], bool], make: Callable[[], tuple[Columns, dict]], *, read_only: bool
) -> Listing:
    """The listing of what lies at `path`: the saved one if it still fits, else what `make` gives, which is saved unless
    it is short, not `settled` or `read_only`; never beside it where it is `apart`, as a file there would give a folder
    of its images another time. Saving is atomic; two who do it at once do it twice."""
    for place in places(path):
        listing = _mapped(place)
        if listing is not None and fits(listing):
            return listing
    columns, facts = make()
    if not is_worth_a_file(facts) or not facts.get("settled", True) or read_only:
        return _in_memory(columns, facts)
    facts = facts | {"id": secrets.token_hex(8)}
    for place in places(path, beside=not facts.get("apart", False)):
        try:
            if not may_be_written(place, _BEGIN, 8):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, columns, facts)
        except OSError:  # the second place may do
            continue
        listing = _mapped(place)
        if listing is not None and listing.facts["id"] == facts["id"]:
            return listing
    warn(f"the index of {path} could not be saved: every rank makes its own, at each start")
    return _in_memory(columns, facts)


def is_worth_a_file(facts: Mapping[str, Any]) -> bool:
    return facts["images"] >= _WORTH_A_FILE


def places(path: Path, *, beside: bool = True) -> Iterator[Path]:
    """Where an index may be kept: beside what it is of, else in the user's cache folder."""
    if path.name in ("", ".."):
        path = path.resolve()
    if beside and path.name:
        yield path.with_name(path.name + SUFFIX)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moco-v3-engine"
    yield cache / (hashlib.sha256(bytes(path.resolve())).hexdigest() + SUFFIX)


def _in_memory(columns: Columns, facts: dict) -> Listing:
    """The listing that no other process shares."""
    arrays = {}
    for name, column in columns.items():
        column.seek(0)
        arrays[name] = np.frombuffer(column.read(), _TYPES[_type(name)])
    return Listing(arrays, facts)


def _type(name: str) -> str:
    return "U8" if name.endswith("_text") else "I64"


def may_be_written(place: Path, begin: bytes, at: int = 0) -> bool:
    """Whether nothing lies there but an index, known by what it has from byte `at` on: a file of the user's may have
    such a name. Raises OSError."""
    if not place.exists():
        return True
    with place.open("rb") as file:
        return file.read(at + len(begin))[at:] == begin


# ---- the file --------------------------------------------------------------------------------------------------------


def _write(path: Path, columns: Columns, facts: dict) -> None:
    """Raises OSError."""
    columns = dict(sorted(columns.items(), key=lambda each: _type(each[0])))  # numbers first, at whole multiples
    header, _ = file_header({name: column.seek(0, os.SEEK_END) for name, column in columns.items()}, facts)
    checksum, whole = zlib.crc32(header), 0
    sweep(path.parent, SUFFIX)
    with shared_draft(path) as place:
        with place.open("wb") as file:
            file.write(header)
            for column in columns.values():
                column.seek(0)
                shutil.copyfileobj(column, file, _CHUNK)
            whole = file.tell()
        with place.open("r+b") as file:
            if whole <= _CHECKED:
                file.seek(len(header))
                checksum = zlib.crc32(file.read(), checksum)
            file.seek(whole)
            file.write(checksum.to_bytes(8, "little"))
        publish(place, path)


def file_header(sizes: Mapping[str, int], facts: dict) -> tuple[bytes, dict[str, int]]:
    """What safetensors has before the arrays; and where, behind it, each of them begins, `checksum` the last.

    sizes: of the arrays in bytes, numbers before texts.
    """
    found, begins, at = {"__metadata__": {"facts": json.dumps(facts)}}, {}, 0
    for name, size in {**sizes, "checksum": 8}.items():
        kind = _type(name)
        found[name] = {"dtype": kind, "shape": [size // _TYPES[kind].itemsize], "data_offsets": [at, at + size]}
        begins[name], at = at, at + size
    text = json.dumps(found).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text, begins


def _mapped(path: Path) -> Listing | None:
    """The listing in a file; None where it is absent, or damaged in any way: what it is of can be listed again."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(data[:8], "little")
        found = json.loads(data[8:begin])
        facts = json.loads(found.pop("__metadata__")["facts"])
        arrays = {name: _array(data, begin, **where) for name, where in found.items()}
        if int(arrays.pop("checksum")[0]) != _checksum(data, begin):
            return None
        if hasattr(mmap, "MADV_RANDOM"):  # else reading one name would fetch many from the disk
            data.madvise(mmap.MADV_RANDOM)
        return Listing(arrays, facts, path)
    except Exception:
        return None


def _array(data: mmap.mmap, begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    (count,), kind = shape, _TYPES[dtype]
    return np.frombuffer(data, kind, count, begin + data_offsets[0]) if count else np.zeros(0, kind)


def _checksum(data: mmap.mmap, begin: int) -> int:
    checksum, end = zlib.crc32(data[:begin]), len(data) - 8
    return zlib.crc32(memoryview(data)[begin:end], checksum) if end <= _CHECKED else checksum


def _mapped_again(path: Path, identity: str) -> Listing:
    """Raises FileNotFoundError where another file has taken the place of the one that was mapped."""
    listing = _mapped(path)
    if listing is None or listing.facts["id"] != identity:
        raise FileNotFoundError(f"{path} was replaced while it was in use; start again")
    return listing
