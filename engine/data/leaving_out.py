"""Images that cannot be read when a run begins: looked for once, left out of its numbers, and kept in its checkpoints.

Shapes: N images of a source, L of them left out.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.data.bad_images import bears, least_fraction
from engine.data.contents import spread
from engine.data.decode import Reading, decode, read_whole
from engine.data.jpeg import Jpeg
from engine.data.packing import in_order
from engine.data.source import Choice, Source
from engine.data.splits import check_batch
from engine.distributed.agreement import agreement, broadcast
from engine.distributed.launcher import spare_cores
from engine.distributed.world import World
from engine.errors import UserError, listed, one_line
from engine.logger import note, warn
from engine.recipe.paths import named
from engine.recipe.sections import Data

_HEADERS = 10**5  # images of a set whose headers are all read; of a larger one some images alone are looked at
_WHOLE = 2048  # images that are read in full, spread over the set,
_PIXELS = 2**32  # or fewer, of so many pixels together
_HEAD = 1 << 17  # bytes of a file, of which nearly every header has fewer
_PART = 64  # images that a thread reads in a row
_NAMED = 20  # images in lines of their own
_SLOW_SECONDS = 5


class Look(NamedTuple):
    """What was found: images that cannot be read, {number: name and why}, among so many headers and whole images."""

    unreadable: dict[int, str]
    headers: int
    whole: int


class LeftOut(Choice):
    """A source without some of its images, as if they were not there: the numbers of the others close up.

    left_out: those images, by their numbers in the source.
    """

    def __init__(self, source: Source, left_out: Mapping[int, str]):
        super().__init__(source)
        self.left_out = dict(sorted(left_out.items()))
        left_L = np.array([*self.left_out], np.int64)
        there_L = left_L[left_L < len(source)]  # of other images than the run began with there may be fewer
        self._count = len(source) - len(there_L)
        self._closed_L = left_L - np.arange(len(left_L))  # the number from which on one more is skipped
        self.labels = None if source.labels is None else np.delete(source.labels, there_L)
        self.by_folder = source.by_folder
        numbers = left_L.astype("<i8").tobytes()
        self.fingerprint = hashlib.sha256(f"left out of {source.fingerprint} ".encode() + numbers).hexdigest()

    def __len__(self) -> int:
        return self._count

    def _number(self, i: int) -> int:
        return i + int(np.searchsorted(self._closed_L, i, side="right"))


def leave_out(
    source: Source, data: Data, world: World, *, batch: int = 1, known: Mapping[int, str] | None = None
) -> Source:
    """A run's training images without those that cannot be read: the `known` ones of a run that has begun, which looks
    at nothing; else those that rank 0 finds now, and says. All ranks call it together.

    batch: train.global_batch_size, which the rest must fill.

    Raises:
        UserError: on every rank, where there are more than data.max_bad_fraction bears, or too few are left.
    """
    if known is None:
        with agreement(world.host_group):
            found = _looked(source, data) if world.is_first else {}
        known = broadcast(found, world.host_group)
    if not known:
        return source
    rest = LeftOut(source, known)
    check_batch(batch, rest, f"{named(data.root)} that can be read")
    return rest


def _looked(source: Source, data: Data) -> dict[int, str]:
    began = time.monotonic()
    found = look(source, Reading.of(data), max(1, spare_cores()))
    seconds, bad, looked = time.monotonic() - began, found.unreadable, max(found.headers, found.whole)
    _check_bearable(bad, looked, data)
    for words in islice(bad.values(), _NAMED):
        warn(f"{words} cannot be read; it is left out")
    if bad or seconds > _SLOW_SECONDS:
        more = f", {len(bad) - _NAMED:,} more than are named; each checkpoint's manifest has all" * (len(bad) > _NAMED)
        part = f" of {len(source):,}" if looked < len(source) else ""
        share = f" ({len(bad) / looked:.2%})" if part else ""
        note(
            f"images: {found.headers:,} headers and {found.whole:,} whole images{part} were looked at in "
            f"{seconds:.0f} s; {len(bad):,}{share} cannot be read and are left out{more}"
        )
    return bad


def _check_bearable(bad: Mapping[int, str], looked: int, data: Data) -> None:
    """looked: at how many images."""
    if len(bad) == looked:
        raise UserError(
            f"data.root must hold readable images; none of {looked:,} in {named(data.root)} is, such as "
            f"{listed([*bad.values()], 3)}; repair them"
        )
    if not bears(data.max_bad_fraction, len(bad), looked):
        least = least_fraction(len(bad), looked)
        raise UserError(
            f"data.max_bad_fraction ({data.max_bad_fraction}) must bear what cannot be read of data.root "
            f"({named(data.root)}): {len(bad):,} of {looked:,} images looked at, such as {listed([*bad.values()], 3)}; "
            f"repair them or take them away, or pass data.max_bad_fraction={least:g} or more"
        )


def look(source: Source, reading: Reading, threads: int) -> Look:
    """Read the headers of all images, in a large set or one that reads whole files alone of some; and some in full.

    The same images each time.
    """
    count, has_heads = len(source), _has_heads(source)
    some = spread(count, _WHOLE)
    every = range(count) if has_heads and count <= _HEADERS else some
    threads = threads if has_heads else 1  # nobody says of others that threads may share them
    pixels, bad = {}, {}
    for i, size, why in _over(_header, source, reading, every, threads):
        pixels[i] = size
        bad |= {i: why} if why else {}
    decoded = not has_heads and not _has_files(source)  # by `read` itself
    few = [] if decoded else _few([i for i in some if i not in bad], pixels)
    bad |= {i: why for i, _, why in _over(_in_full, source, reading, few, threads) if why}
    words = {i: f"{source.name(i)} ({why})" for i, why in sorted(bad.items())}
    return Look(words, len(every), len(every) if decoded else len(few))


def _few(numbers: list[int], pixels: Mapping[int, int]) -> list[int]:
    """Of some images all, or as many spread over them as have _PIXELS together."""
    if not numbers:
        return []
    mean = max(1, sum(pixels[i] for i in numbers) // len(numbers))
    return [numbers[k] for k in spread(len(numbers), max(1, _PIXELS // mean))]


def _has_heads(source: Source) -> bool:
    try:
        return source.head(0, _HEAD) is not None
    except OSError:
        return True


def _has_files(source: Source) -> bool:
    try:
        return source.file(0) is not None
    except Exception:  # a file that cannot be read
        return True


Work = Callable[[Source, int, Reading], int]  # reads an image, and says how many pixels it has
Shown = tuple[int, int, str]  # an image's number, its pixels, why it cannot be read


def _over(work: Work, source: Source, reading: Reading, numbers: Sequence[int], threads: int) -> Iterator[Shown]:
    """What `work` says of the images, in order."""

    def part(begin: int) -> list[Shown]:
        return [(i, *_tried(work, source, i, reading)) for i in numbers[begin : begin + _PART]]

    return chain.from_iterable(in_order(part, range(0, len(numbers), _PART), threads))


def _tried(work: Work, source: Source, i: int, reading: Reading) -> tuple[int, str]:
    try:
        return work(source, i, reading), ""
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow raise nearly anything
        return 0, one_line(f"{type(error).__name__}: {error}")


def _header(source: Source, i: int, reading: Reading) -> int:
    image = _begun(source, i) or source.read(i)
    reading.check_size(image)
    return image.width * image.height


def _begun(source: Source, i: int) -> Image.Image | Jpeg | None:
    """The image by the first bytes of its file; None where these do not suffice."""
    try:
        data = source.head(i, _HEAD)
        return None if data is None else decode(data)
    except Exception:  # a header may be longer, or lie at the file's end: the whole file decides
        return None


def _in_full(source: Source, i: int, reading: Reading) -> int:
    image = source.read(i)
    read_whole(image, reading)
    return image.width * image.height
