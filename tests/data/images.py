"""Tiny images and tars of them, each known by its shade."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


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
