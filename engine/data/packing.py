"""Any source as tars of about one size, and their index. They are written one after the other, so that what was broken
off goes on with the next; and read back at the end."""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from engine.data.index import open_index
from engine.data.opening import open_source
from engine.data.paths import FileSource
from engine.data.samples import BLOCK, Sample, Samples
from engine.data.source import Root, Source
from engine.errors import RunFailed, SystemRefused, UserError, reason
from engine.files import draft, lock, publish, remove_drafts, replace_file, sync

A = TypeVar("A")
T = TypeVar("T")

_STATE = "pack.jsonl"  # what the tars are made of; and a line for each that is whole
_LOCK = ".pack.lock"
_END = bytes(2 * BLOCK)  # of a tar
_AHEAD = 4  # images for each thread that wait to be written
_NAMED = 20  # images that are not as they were to be
_LOST_IN_A_ROW = 100  # images; more are no accident


@dataclass(frozen=True)
class Form:
    """shard_size: bytes of a tar at most, but for that of one large image; short_side: `Samples` has it."""

    shard_size: int
    short_side: int | None


@dataclass
class Tar:
    """One that is whole. end: how many images of the split are in it and in those before; lost: the numbers of images
    that could not be read, of which there is nothing. as_they_were: images that could not be made smaller."""

    name: str
    split: str
    end: int
    images: int
    bytes: int
    sha256: str
    lost: list[int] = field(default_factory=list)
    as_they_were: int = 0


class Packing:
    """The images of some splits, on their way to a folder.

    Args:
        splits: by the word that their tars' names begin with.
        threads: that read images and make them smaller.
        follow: shows how far it is: given numbers, how many there are and what is done with them, the same numbers.
        say: takes a line about an image that is not packed, or not as it was to be.

    """

    def __init__(
        self,
        splits: Mapping[str, Source],
        out: Path,
        form: Form,
        threads: int,
        follow: Callable[[Iterable[T], int, str], Iterable[T]],
        say: Callable[[str], None],
    ):
        self.splits, self.out, self.form, self.threads = splits, out, form, threads
        self._follow, self._say = follow, say
        self.samples = {split: Samples(source, form.short_side) for split, source in splits.items()}
        self.tars: list[Tar] = []
        self._said = 0

    def pack(self) -> None:
        """Write the tars that are not there, and read all of them back.

        Raises UserError where the folder holds something else or is too small, SystemRefused where it cannot be
        written, RunFailed where the images cannot be read, or the tars are not what was written.
        """
        with self._held():
            self.tars = self._begun()
            self._check_room()
            for split, source in self.splits.items():
                done = self.tars_of(split)
                self._write(split, len(done), range(done[-1].end if done else 0, len(source)))
            for split in self.splits:
                self._verify(split)

    def tars_of(self, split: str) -> list[Tar]:
        """Those that are whole, in order."""
        return [tar for tar in self.tars if tar.split == split]

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The folder, for this process alone."""
        try:
            if not (self.out / _STATE).exists():
                self._check_room()  # before anything is made
            self.out.mkdir(parents=True, exist_ok=True)
            if not (self.out / _STATE).exists() and any(each.name != _LOCK for each in self.out.iterdir()):
                raise UserError(f"OUT ({self.out}) must be a new or an empty folder; pass another")
            with lock(self.out / _LOCK, f"OUT ({self.out}) must be free; another process packs into it"):
                yield
        except OSError as error:
            again = "then the same command goes on"
            raise SystemRefused(
                f"OUT ({self.out}) must be a folder that can be written; {reason(error)}; {again}"
            ) from error

    # ---- what is there

    def _begun(self) -> list[Tar]:
        """The tars that an earlier start has left whole, one after the other; what else is left of it goes."""
        made_of = asdict(self.form) | {"images": {split: source.fingerprint for split, source in self.splits.items()}}
        path, found = self.out / _STATE, []
        if path.exists():
            try:
                first, *rows = [json.loads(line) for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
                found = [Tar(**row) for row in rows]
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} must be as packing left it; pass another OUT, or remove this one") from error
            if first != made_of:
                raise UserError(f"OUT ({self.out}) must have been begun with the same images and options; pass another")
        remove_drafts(self.out, {each.name.partition(".tmp-")[0] for each in self.out.iterdir()})
        whole = list(takewhile(self._has, found))
        replace_file(path, "".join(json.dumps(row) + "\n" for row in (made_of, *map(asdict, whole))))
        return whole

    def _has(self, tar: Tar) -> bool:
        path = self.out / tar.name
        return path.is_file() and path.stat().st_size == tar.bytes

    def _note(self, tar: Tar) -> None:
        self.tars.append(tar)
        with (self.out / _STATE).open("a") as file:
            file.write(json.dumps(asdict(tar)) + "\n")
            file.flush()
            sync(file)

    def _check_room(self) -> None:
        """Of files that stay as they are it is known what they take."""
        if self.form.short_side is None and all(source.files() is not None for source in self.splits.values()):
            needed = sum(bytes_of(source) + 2 * BLOCK * len(source) for source in self.splits.values())
            needed -= sum(tar.bytes for tar in self.tars)
            out = self.out.absolute()
            free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
            if needed > free:
                room = f"{readable(needed)} free, and has {readable(free)}"
                raise UserError(f"OUT ({self.out}) must have about {room}; pass another, or --short-side 256")

    # ---- writing

    def _write(self, split: str, done: int, numbers: range) -> None:
        """The tars of a split after those that are done, of its images that are in none."""
        samples = in_order(self.samples[split].sample, numbers, self.threads)
        found = iter(self._follow(zip(numbers, samples, strict=True), len(numbers), f"packing {split}"))
        ahead = next(found, None)
        while ahead is not None:
            tar = Tar(f"{split}-{done:06}.tar", split, ahead[0], 0, 0, "")
            path, done = self.out / tar.name, done + 1
            with draft(path) as place:
                with place.open("xb") as file:
                    ahead = self._fill(tar, file.write, ahead, found)
                publish(place, path)
            open_index(path)
            self._note(tar)

    def _fill(
        self, tar: Tar, write: Callable[[bytes], int], ahead: tuple[int, Sample] | None, found: Iterator
    ) -> tuple[int, Sample] | None:
        """Write one tar, from the sample `ahead` on; the first sample that has no room in it."""
        sha256 = hashlib.sha256()
        while ahead is not None:
            number, sample = ahead
            if tar.images and tar.bytes + len(sample.record) + len(_END) > self.form.shard_size:
                break
            write(sample.record)
            sha256.update(sample.record)
            tar.bytes, tar.images, tar.end = (
                tar.bytes + len(sample.record),
                tar.images + bool(sample.record),
                number + 1,
            )
            tar.as_they_were += bool(sample.as_it_was)
            if sample.lost:
                tar.lost.append(number)
                self._check_lost(tar.lost, sample)
            if sample.lost or sample.as_it_was:
                self._say_of(sample)
            ahead = next(found, None)
        write(_END)
        sha256.update(_END)
        tar.bytes, tar.sha256 = tar.bytes + len(_END), sha256.hexdigest()
        return ahead

    def _check_lost(self, lost: list[int], sample: Sample) -> None:
        if len(lost) >= _LOST_IN_A_ROW and lost[-1] - lost[-_LOST_IN_A_ROW] < _LOST_IN_A_ROW:
            raise RunFailed(
                f"{_LOST_IN_A_ROW} images in a row could not be read: {sample.lost}; the same command goes on"
            )

    def _say_of(self, sample: Sample) -> None:
        self._said += 1
        if self._said <= _NAMED:
            self._say(f"left out: {sample.lost}" if sample.lost else f"packed as it is: {sample.as_it_was}")
        elif self._said == _NAMED + 1:
            self._say("there are more of these")

    # ---- reading back

    def packed(self, split: str) -> FileSource:
        """The images of a split, as whoever trains on the tars finds them."""
        source = open_source(Root("shards", self.out, "OUT"), "val" if split == "val" else "train")
        assert isinstance(source, FileSource)
        return source

    def _verify(self, split: str) -> None:
        tars = self.tars_of(split)
        for tar in self._follow(tars, len(tars), f"reading {split} back"):
            if _sha256(self.out / tar.name) != tar.sha256:
                raise RunFailed(
                    f"{self.out / tar.name} is not what was written; remove it, and the same command goes on"
                )
        lost = {number for tar in tars for number in tar.lost}
        source, samples, packed = self.splits[split], self.samples[split], self.packed(split)
        count = len(source) - len(lost)
        gained = source.labels is None and bool(lost)  # the one that lay in no folder may be lost, and all others do
        if len(packed) != count or ((packed.labels is None) != (source.labels is None) and not gained):
            raise RunFailed(f"{self.out} holds {len(packed)} images of {split}, and {count} were written")
        kept = (i for i in range(len(source)) if i not in lost)
        for j, i in enumerate(self._follow(kept, count, f"comparing {split}")):
            same = packed.path(j).rpartition(b".")[0] == samples.stem(i)
            if not same or (samples.classes and packed.classes[packed.labels[j]] != samples.classes[source.labels[i]]):
                raise RunFailed(f"{packed.name(j)} in {self.out} must be {source.name(i)} and of its class")


def readable(size: int) -> str:
    """Of bytes: a number of GB, MB or kB."""
    factor, unit = next((each for each in ((1e9, "GB"), (1e6, "MB")) if size >= each[0]), (1e3, "kB"))
    return f"{size / factor:,.1f} {unit}"


def bytes_of(source: Source) -> int:
    """Of all files of a source that has files."""
    return sum(size for _, _, size in source.groups())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_order(make: Callable[[A], T], numbers: Iterable[A], threads: int) -> Iterator[T]:
    """What `make` returns for each number, made by threads a little ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for number in numbers:
            ahead.append(pool.submit(make, number))
            if len(ahead) > _AHEAD * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
