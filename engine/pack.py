"""Images of any source as tars, of which a run opens hundreds and not millions: `mocov3 pack SOURCE OUT`.

SOURCE is a folder of images, tars or one tar, a text file of paths, or the root of a dataset of torchvision. Its train
and val become OUT/train-000000.tar ... and OUT/val-000000.tar ..., where it has both; else OUT/images-000000.tar ...
Train on them with data.source=shards data.root=OUT.

Files are taken as they are, in order and with labels. With --short-side an image of more pixels is made smaller, a JPEG
(of quality 95) where it was one, else PNG: it takes less room and is decoded sooner, and small crops of it are less
sharp. What is broken off goes on with the same command. All tars are read back at the end. The last line on stdout is
the result as JSON.
"""

import re
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine import cli, door
from engine.errors import UserError, listed
from engine.logger import note, progress, warn

if TYPE_CHECKING:
    from engine.data.packing import Packing
    from engine.data.source import Source

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SAMPLED = 64  # images whose decoding is timed


def main(arguments: list[str]) -> None:
    parser = cli.Parser("engine.pack", __doc__)
    parser.add_argument("SOURCE", type=partial(cli.read_roots, name="SOURCE"), help=f"{cli.IMAGES}; several as [a, b]")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--shard-size", type=read_size, default="512M", help="of a tar at most (default: 512M)")
    side = cli.at_least(1, "--short-side", "256 is usual")
    parser.add_argument(
        "--short-side", type=side, metavar="PIXELS", help="of images that have more (default: as they are)"
    )
    cli.add_images(parser)
    options = parser.parse_args(arguments)
    (root,) = cli.image_roots(options, "SOURCE")

    from engine.data.opening import open_source  # loads PyTorch
    from engine.data.packing import Form, Packing

    train, val = (open_source(root, split) for split in ("train", "val"))
    for line in dict.fromkeys(line for source in (train, val) if source is not None for line in source.notes):
        note(line)
    splits = {"images": train} if val is None else {"train": train, "val": val}
    threads = max(1, cli.decoding_workers(options))
    packing = Packing(splits, options.out, Form(options.shard_size, options.short_side), threads, progress, warn)
    for split, samples in packing.samples.items():
        if samples.renamed:
            note(f"{split}: classes have other names in files: {listed(samples.renamed, most=5)}")
    packing.pack()
    for split in splits:
        note(_gains(packing, split))
    tars = packing.tars
    found = {"images": sum(tar.images for tar in tars), "shards": len(tars), "bytes": sum(tar.bytes for tar in tars)}
    found["left_out"] = sum(len(tar.lost) for tar in tars)
    if stayed := sum(tar.as_they_were for tar in tars):
        note(f"{stayed:,} images could not be made smaller and are as they were")
    door.result(found)


def read_size(text: str) -> int:
    """The type of --shard-size: bytes, or K, M, G or T of them. Raises UserError."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text.upper().removesuffix("B"))
    if not match or not int(match[1]):
        raise UserError(f"--shard-size ({text}) must be a size such as 512M; 512M to 2G are usual")
    return int(match[1]) * _UNITS[match[2]]


def _gains(packing: "Packing", split: str) -> str:
    """What packing a split was good for, in a line."""
    from engine.data.packing import bytes_of, readable

    source, packed = packing.splits[split], packing.packed(split)
    tars = packing.tars_of(split)
    size, images = sum(tar.bytes for tar in tars), sum(tar.images for tar in tars)
    before = "" if source.files() is None else f", before {readable(bytes_of(source))}"
    sooner = f"decoded in {_milliseconds(packed):.2f} ms of CPU time each, before in {_milliseconds(source):.2f}"
    return (
        f"{split}: {images:,} images in {len(tars):,} tar{'s' * (len(tars) > 1)} of {readable(size)}{before}; {sooner}"
    )


def _milliseconds(source: "Source") -> float:
    """CPU time of an image that is read and decoded, in the mean of some."""
    from engine.data.contents import spread
    from engine.data.decode import to_rgb

    seconds = []
    for i in [0, *spread(len(source), _SAMPLED)]:  # the first time, Pillow loads what it needs
        began = time.process_time()
        with suppress(Exception):  # one that cannot be read, in either
            to_rgb(source.read(i)).load()
            seconds.append(time.process_time() - began)
    return 1e3 * sum(seconds[1:]) / max(1, len(seconds) - 1)


if __name__ == "__main__":
    door.enter(main)
