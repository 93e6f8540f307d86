"""How long a start takes with many images, and what memory a rank needs for them: `python -m tests.data.many FOLDER`
prints a table, of CPU seconds. FOLDER must be new; it takes up to 5 GB and goes at the end.

Up to a million images lie there, in folders of a thousand and in tars of ten thousand; they are empty, as no start
looks into many. Of more there is one tar with one image, and an index as long as theirs would be: a file that is zero
but for the rows that are read.
"""

import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from engine.data import shards
from engine.data.listing import file_header
from engine.data.opening import open_source
from engine.data.order import Order
from engine.data.source import Root, Source
from tests.data.images import pack, png

BATCH = 4096
BEGINNINGS = 3  # of epochs that are read
LONGEST_REAL = 10**6
PER_FOLDER, PER_TAR = 1000, 10_000
NAME, CLASSES = b"class/12345678.jpg", 1000  # of the images that are made up


# ---- images ----------------------------------------------------------------------------------------------------------


def fill_folder(root: Path, images: int) -> None:
    for first in range(0, images, PER_FOLDER):
        folder = root / f"{first // PER_FOLDER:06}"
        folder.mkdir(parents=True)
        for i in range(first, min(images, first + PER_FOLDER)):
            os.close(os.open(folder / f"{i:09}.jpg", os.O_CREAT | os.O_WRONLY))


def fill_tars(root: Path, images: int) -> None:
    root.mkdir()
    for first in range(0, images, PER_TAR):
        with (root / f"{first // PER_TAR:06}.tar").open("wb") as file:
            for i in range(first, min(images, first + PER_TAR)):
                file.write(tarfile.TarInfo(f"{i // PER_FOLDER:06}/{i:09}.jpg").tobuf(tarfile.USTAR_FORMAT))
            file.write(bytes(1024))


def make_up(root: Path, images: int) -> None:
    """A tar, and an index by which it holds so many images. Those that epochs begin with are there."""
    root.mkdir()
    tar = root / "x.tar"
    tar.write_bytes(pack({NAME.decode(): png(7)}))
    sizes = dict.fromkeys(("name_ends", "sizes", "offsets", "labels"), 8 * images) | {"tar_images": 8, "tar_ends": 8}
    sizes |= {"tar_text": len("x.tar"), "name_text": len(NAME) * images}
    facts = {"images": images, "classes": [f"class {k}" for k in range(CLASSES)], "fingerprint": f"{images:064x}"}
    facts |= {
        "id": "made up",
        "by_folder": "directly",
        "survey": {"left_out": {}, "otherwise": None},
        "about_labels": None,
        "otherwise": None,
    }
    facts |= {"stamp": shards._stamp([tar], False), "headers": shards._headers([tar], np.array([images]), lambda i: 0)}
    header, begins = file_header(sizes, facts)
    with (root / "train.tars.index").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(sizes.values()) + 8)
    with (root / "train.tars.index").open("r+b") as file:

        def put(column: str, i: int, value: bytes | int) -> None:
            file.seek(len(header) + begins[column] + 8 * i)
            file.write(value if isinstance(value, bytes) else value.to_bytes(8, "little"))

        for column, value in {"tar_images": images, "tar_ends": 5, "tar_text": b"x.tar", "name_text": NAME}.items():
            put(column, 0, value)
        for i in first_images(images):
            row = {"name_ends": len(NAME), "sizes": len(png(7)), "offsets": 512, "labels": i % CLASSES}
            for column, value in row.items():
                put(column, i, value)
        put("checksum", 0, zlib.crc32(header))


def first_images(images: int) -> list[int]:
    """Those that epochs begin with; no two are neighbours, as a name begins where the one before ends."""
    found = np.concatenate([_first(images, epoch) for epoch in range(BEGINNINGS)])
    return sorted(set(found.tolist()) - set((found + 1).tolist()))


def _first(images: int, epoch: int) -> np.ndarray:
    return Order(0, images, BATCH).samples(epoch, np.arange(BATCH))


# ---- what a start takes ----------------------------------------------------------------------------------------------


def measured(open_it: Callable[..., Source], *arguments: object) -> dict:
    """Of a process of its own, forked from one that has done nothing: CPU seconds until the first batch of an epoch is
    known, those of the first batch of the next epoch, and MB that this process alone holds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
        return process.submit(_measure, open_it, arguments).result()


def _measure(open_it: Callable[..., Source], arguments: tuple) -> dict:
    before, began = private_mb(), time.process_time()
    source = open_it(*arguments)
    _look_up(source, 0)
    seconds, began = time.process_time() - began, time.process_time()
    _look_up(source, 1)
    next_epoch = time.process_time() - began
    return {"seconds": seconds, "next_epoch": next_epoch, "mb": private_mb() - before, "copy": pickle.dumps(source)}


def _look_up(source: Source, epoch: int) -> None:
    for i in _first(len(source), epoch).tolist():
        source.name(i)
        int(source.labels[i])


def private_mb() -> float:
    """What this process has for itself; what it maps of files is not among it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1000


def start_of(root: Path, kind: str) -> dict:
    """A start that finds the index, and that of another rank of the node, which is given a copy."""
    first = measured(open_source, Root(kind, root), "train")
    other = measured(pickle.loads, first["copy"])
    return {"first": first, "other": other}


# ---- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    work = Path(sys.argv[1])
    work.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    print("| images | of | listed once | start | another rank's | next epoch | MB of a rank |")
    print("|---|---|---|---|---|---|---|")
    try:
        for power in range(4, 10):
            images = 10**power
            real = {"folder": fill_folder, "shards": fill_tars}
            for kind, fill in (real if images <= LONGEST_REAL else {"shards": make_up}).items():
                fill(work / "images", images)
                _row(work / "images", kind, images)
                shutil.rmtree(work / "images")
                (work / "images.index").unlink(missing_ok=True)
    finally:
        shutil.rmtree(work)


def _row(root: Path, kind: str, images: int) -> None:
    listed = None
    if images <= LONGEST_REAL:
        listed = measured(open_source, Root(kind, root), "train")["seconds"]
    found = start_of(root, kind)
    cells = [f"{images:,}", kind if listed is not None else "index alone"]
    cells += ["" if listed is None else f"{listed:.1f} s", *(f"{found[who]['seconds']:.2f} s" for who in found)]
    cells += [f"{found['first']['next_epoch']:.2f} s", f"{max(each['mb'] for each in found.values()):.0f}"]
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
