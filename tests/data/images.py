"""Tiny images and tars of them, many of which are known by their shade."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(shade: int) -> bytes:
    return encoded(Image.new("RGB", (4, 3), (shade, 0, 0)), "PNG")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def fill(root: Path, names: dict[str, int]) -> Path:
    for name, shade in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(shade))
    return root


def shades(source) -> list[int]:
    return [source.read(i).getpixel((0, 0))[0] for i in range(len(source))]


def pack(members: dict[str, bytes], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def thinned(tar: Path, every: int, out: Path) -> Path:
    """`out`, a tar of one in so many images of another."""
    with tarfile.open(tar) as whole, tarfile.open(out, "w") as part:
        for member in whole.getmembers()[::every]:
            part.addfile(member, whole.extractfile(member))
    return out
