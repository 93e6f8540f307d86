"""Every image of a set read in full: what kinds there are, which cannot be read, how they lie, which are the same.

Shapes: N images of a split, C classes.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.data.decode import Reading, decode, read_whole
from engine.data.hints import brightest, lies
from engine.data.jpeg import Jpeg
from engine.data.orientation import UPRIGHT
from engine.data.packing import in_order
from engine.data.pillow import opened
from engine.data.source import Source
from engine.data.survey import suffix_of
from engine.data.workers import Workers
from engine.errors import one_line

_PART = 32  # images that a process is asked for at once
_NO_PIXELS = np.empty((0, 3, 1, 1), np.uint8)


class Seen(NamedTuple):
    """What one image shows; of one that cannot be read, what is known of it.

    why: it cannot be read; empty where it can. too_large: for that alone. kind: of its file and pixels. shorter,
    longer: its sides in pixels. lies: as engine.data.orientation has it. brightest: of a grey image of more than 8
    bits. digest: 64 bits, of its file's bytes or of its pixels where it has no file; 0 where it cannot be read.
    """

    why: str = ""
    too_large: bool = False
    kind: str = ""
    shorter: int = 0
    longer: int = 0
    lies: int = UPRIGHT
    brightest: int | None = None
    digest: int = 0


Follow = Callable[[Iterable[Seen], int, str], Iterable[Seen]]


@dataclass
class Tally:
    """What the images of a split show, in all. unreadable: of each its number and why; lying: numbers."""

    source: Source
    images: int = 0
    bytes: int = 0
    suffixes: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    unreadable: dict[int, str] = field(default_factory=dict)
    too_large: list[int] = field(default_factory=list)
    lying: list[int] = field(default_factory=list)
    shorter: array = field(default_factory=lambda: array("q"))
    longer: array = field(default_factory=lambda: array("q"))
    brightest: list[int] = field(default_factory=list)
    digests: array = field(default_factory=lambda: array("Q"))

    def add(self, seen: Seen, file: tuple[str, int] | None) -> None:
        """The next image, and the name and size of its file."""
        if file is not None:
            name, size = file
            folder, slash, _ = name.partition("/")
            self.bytes += max(0, size)
            self.suffixes[suffix_of(name.encode())] += 1
            self.folders[folder if slash else ""] += 1
        if seen.why:
            self.unreadable[self.images] = seen.why
        if seen.too_large:
            self.too_large.append(self.images)
        if seen.lies != UPRIGHT:
            self.lying.append(self.images)
        if seen.kind:
            self.kinds[seen.kind] += 1
            self.shorter.append(seen.shorter)
            self.longer.append(seen.longer)
        if seen.brightest is not None:
            self.brightest.append(seen.brightest)
        self.digests.append(seen.digest)
        self.images += 1


class Same(NamedTuple):
    """Images of the same bytes, by split and number."""

    images: list[tuple[str, int]]
    labels_differ: bool


def tally(splits: Mapping[str, Source], reading: Reading, processes: int, follow: Follow) -> dict[str, Tally]:
    """Read all images of some splits, by that many loading processes. follow: shows how far it is.

    Raises RunFailed where a process dies.
    """
    found = {}
    with Workers([*splits.values()], processes) as workers:
        for split, source in splits.items():
            found[split], files = Tally(source), source.files()
            seen = follow(_all_seen(source, reading, workers), len(source), f"reading {split}")
            for each, file in zip(seen, repeat(None) if files is None else files, strict=False):
                found[split].add(each, file)
    return found


def _all_seen(source: Source, reading: Reading, workers: Workers) -> Iterator[Seen]:
    def look(begin: int) -> list[Seen]:
        numbers = range(begin, min(begin + _PART, len(source)))
        return workers.read(source, _look_at, (numbers, reading), _NO_PIXELS)

    return chain.from_iterable(in_order(look, range(0, len(source), _PART), max(1, workers.count)))


def _look_at(source: Source, which: tuple[Sequence[int], Reading], _: np.ndarray) -> list[Seen]:
    numbers, reading = which
    return [_look(source, i, reading) for i in numbers]


def _look(source: Source, i: int, reading: Reading) -> Seen:
    seen = Seen()
    try:
        data = source.file(i)
        image = source.read(i) if data is None else decode(data)
        seen = _shown(opened(data) if data is not None and isinstance(image, Jpeg) else image)
        read_whole(image, reading)
        # After it was read: to ask a PNG reads it, and its damage is said once alone.
        seen = seen._replace(lies=lies(image), brightest=brightest(image))
        return seen._replace(digest=_digest(source.content(i) if data is None else data))
    except MemoryError:
        raise
    except Exception as error:  # whatever its file, or whoever decodes it, has to say
        too_large = seen.shorter * seen.longer > reading.max_pixels
        return seen._replace(why=one_line(f"{type(error).__name__}: {error}"), too_large=too_large)


def _shown(header: Image.Image) -> Seen:
    shorter, longer = sorted(header.size)
    kind = f"{header.format} {header.mode}" if header.format else header.mode
    return Seen(kind=kind, shorter=shorter, longer=longer)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def find_same(found: Mapping[str, Tally]) -> list[Same]:
    """The groups of images that hold the same bytes, within splits and across them, the largest first."""
    digest_N = np.concatenate([np.frombuffer(each.digests, np.uint64) for each in found.values()])
    splits, ends = [*found], np.cumsum([each.images for each in found.values()])
    order_N = np.argsort(digest_N, kind="stable")
    order_N = order_N[np.searchsorted(digest_N[order_N], 1) :]  # without those that cannot be read
    cuts = np.flatnonzero(np.diff(digest_N[order_N])) + 1

    def at(n: int) -> tuple[str, int]:
        k = int(np.searchsorted(ends, n, side="right"))
        return splits[k], n - int(ends[k - 1]) if k else n

    groups = [[at(n) for n in group.tolist()] for group in np.split(order_N, cuts) if len(group) > 1]
    same = [Same(group, len({_class(found[split].source, i) for split, i in group}) > 1) for group in groups]
    return sorted(same, key=lambda each: -len(each.images))


def _class(source: Source, i: int) -> str | None:
    return None if source.labels is None else source.classes[source.labels[i]]
