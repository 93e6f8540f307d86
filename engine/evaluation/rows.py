"""What a network says of every image of a source, streamed to files: a row each, in the source's order, on any number
of ranks the same.

Shapes: N rows, B rows of a batch of all ranks, D outputs.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from numpy.lib import format as npy

from engine.data.source import Root, Source
from engine.data.workers import Workers
from engine.distributed.agreement import agreement, all_gather, broadcast, gather
from engine.distributed.world import World
from engine.errors import RunFailed, UserError, escaped, reason
from engine.evaluation.features import BATCH, Features, batches_for, extract, progress, rank_slice
from engine.evaluation.subject import Subject
from engine.files import draft, publish, shared_draft, sweep
from engine.logger import note, warn


class Sink(Protocol):
    """A file that takes rows: `write` each batch's, `close` once all are there."""

    def write(self, rows: Features) -> None: ...

    def close(self) -> None: ...


def batches_of_rows(subject: Subject, source: Source, what: str, world: World, readers: Workers) -> Iterator[Features]:
    """On rank 0 every rank's rows, batch by batch in the source's order; elsewhere nothing, as often.

    Raises RunFailed, on every rank, where an output is not finite.
    """
    ids, batches = rank_slice(len(source), world.rank, world.size, BATCH)
    found = batches_for(subject, source, ids.numpy(), readers, "it is left out", batches)
    for batch in progress(found, batches, what, "batch", world):
        rows = extract(subject, [batch], world.device)
        if not all(all_gather(bool(rows.feature_ND.isfinite().all()), world.host_group)):
            raise RunFailed("the network's outputs are not finite: its weights have diverged; use another CHECKPOINT")
        parts = gather(rows, world.host_group) or [Features(*(column[:0] for column in rows))]
        yield Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def write_rows(
    subject: Subject, source: Source, what: str, world: World, readers: Workers, open_sinks: Callable[[], list[Sink]]
) -> int:
    """Give all rows to the sinks that rank 0 opens; returns how many there are, on every rank.

    Raises RunFailed, on every rank, where no image can be read or a file cannot be written.
    """
    with writing(world):
        sinks = open_sinks() if world.is_first else []
    count = 0
    for rows in batches_of_rows(subject, source, what, world, readers):
        with writing(world):
            for sink in sinks:
                sink.write(rows)
        count += len(rows.id_N)
    with writing(world):
        for sink in sinks:
            sink.close()
    count = broadcast(count, world.host_group)
    if not count:
        raise RunFailed(f"none of {len(source)} images could be read, {source.name(0)} and others; mend them")
    if count < len(source) and world.is_first:
        warn(f"{len(source) - count} of {len(source)} images could not be read and have no row")
    return count


@contextmanager
def writing(world: World) -> Iterator[None]:
    """What rank 0 alone writes: where the system refuses it, every rank raises RunFailed."""
    with agreement(world.host_group):
        try:
            yield
        except OSError as error:
            raise RunFailed(f"OUT could not be written: {reason(error)}; nothing was left of it") from error


@contextmanager
def written(world: World, *files: Path) -> Iterator[list[Path]]:
    """Free names beside the files, which take their names at the end if all went well; on rank 0, elsewhere unused."""
    with ExitStack() as stack:
        with writing(world):
            if world.is_first:
                for file in files:
                    sweep(file.absolute().parent, file.name)  # of calls that were killed
            places = [stack.enter_context((shared_draft if world.is_first else draft)(file)) for file in files]
        yield places
        with writing(world):
            if world.is_first:
                for place, file in zip(places, files, strict=True):
                    publish(place, file)


def check_new(files: Sequence[Path], force: bool) -> None:
    """Raises UserError where one of the files could not be written, or is there and must not be replaced."""
    for file in files:
        try:
            if not file.absolute().parent.is_dir():
                raise UserError(f"OUT ({file}) must lie in a folder that exists; make {file.absolute().parent}")
            if file.is_dir() or (file.exists() and not force):
                raise UserError(f"OUT ({file}) must not exist; pass another name, or --force to replace a file")
            with draft(file) as place:
                place.touch()
        except OSError as error:
            raise UserError(
                f"OUT ({file}) must lie in a folder that can be written: {reason(error)}; pass another"
            ) from None


# ---- files -----------------------------------------------------------------------------------------------------------


class Array:
    """A .npy file of float32 [N, D]; N is known once it is closed."""

    def __init__(self, place: Path, width: int):
        self._file, self._width, self._count = place.open("wb"), width, 0
        self._head()

    def write(self, rows: Features) -> None:
        self._file.write(rows.feature_ND.numpy().astype("<f4").tobytes())
        self._count += len(rows.id_N)

    def close(self) -> None:
        self._file.seek(0)
        self._head()
        self._file.close()

    def _head(self) -> None:
        """numpy leaves room in it for any number of rows, so it is as long each time."""
        shape = (self._count, self._width)
        npy.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": shape})


class FileNames:
    """What tables call an image: where it lies below the root (a tar or a list: below its folder), so that a file can
    be opened by it; of several roots, with the root before it. Bytes of a name that are no UTF-8 are written as \\xNN,
    which is said."""

    def __init__(self, source: Source, root: Root):
        self._source = source
        folder = root.path if root.path.is_dir() else root.path.parent
        self._lead = "" if root.more else f"{folder}/"
        self._is_said = False

    def __getitem__(self, i: int) -> str:
        place = self._source.place(i).removeprefix(self._lead)
        name = os.fsencode(place).decode(errors="backslashreplace")
        if not self._is_said and name != place:
            self._is_said = True
            note(f"names that are no UTF-8 have \\xNN for such bytes in OUT, as {escaped(name)}")
        return name


def csv_lines(file: IO[str]) -> "csv.Writer":
    """A csv.writer of lines that end in \\n, and in which csv.reader finds any names again."""

    class Lines:
        def write(self, line: str) -> int:
            return file.write(line.removesuffix("\r\n") + "\n")

    return csv.writer(Lines())  # it quotes the characters that lines end in by its own account, so both of these


class Table:
    """A .csv file with a header, a line for each row: `line` of (row, name, label) of an image and its outputs [D]."""

    def __init__(self, place: Path, source: Source, names: FileNames, header: Sequence[str]):
        self._file = place.open("w", encoding="utf-8", newline="")
        self._csv, self._source, self._names, self._count = csv_lines(self._file), source, names, 0
        self._csv.writerow(header)

    def write(self, rows: Features) -> None:
        for i, label, output_D in zip(rows.id_N.tolist(), rows.label_N.tolist(), rows.feature_ND, strict=True):
            name = self._source.classes[label] if self._source.classes and label >= 0 else ""
            self._csv.writerow(self.line(self._count, self._names[i], name, output_D.numpy()))
            self._count += 1

    def line(self, row: int, name: str, label: str, output_D: np.ndarray) -> list[object]:
        return [row, name, label]

    def close(self) -> None:
        self._file.close()
