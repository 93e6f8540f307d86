"""Images of any source as members of a tar: their names there, their labels, and fewer pixels where that is wanted.

Shapes: C classes.
"""

import io
import os
import tarfile
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageMode

from engine.data.decode import AS_IT_IS, is_image_name, to_rgb
from engine.data.folder import FolderSource
from engine.data.labels import read_label
from engine.data.orientation import TAG, UPRIGHT, orientation
from engine.data.paths import FileSource
from engine.data.pillow import opened
from engine.data.source import Source
from engine.errors import one_line

BLOCK = 512
_SUFFIX_OF = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
_SUFFIX_OF |= {"PPM": ".ppm", "AVIF": ".avif"}
_JPEG = ("JPEG", "MPO")  # as Pillow calls one that other pictures follow in the same file
_QUALITY = 95  # of a JPEG that is made smaller


class Sample(NamedTuple):
    """An image as it lies in a tar, headers and all; lost: why it could not be read, and then there is nothing of it.

    as_it_was: why it was not made smaller, though it was to be.
    """

    record: bytes
    lost: str = ""
    as_it_was: str = ""


class Samples:
    """The images of a source by number, as samples; threads may share it.

    Args:
        short_side: in pixels, of images that have more.

    classes: as a reader of the tars will call the source's; None without labels. renamed: those that it cannot call as
    they are called here.
    """

    def __init__(self, source: Source, short_side: int | None):
        self._source, self._short_side = source, short_side
        by_path = isinstance(source, FileSource) and source.by_folder is not None
        self._keeps_paths = by_path or isinstance(source, FolderSource)
        names = None if source.classes is None else _names_in_files(source.classes)
        self.classes = source.classes if self._keeps_paths else names
        self.renamed = [
            f"{old} is {new}" for old, new in zip(source.classes or (), self.classes or (), strict=True) if old != new
        ]
        self._turn = threading.Lock()  # for data sets that nobody says threads may read

    def stem(self, i: int) -> bytes:
        """The path of image i in its tar, without the suffix: its own, where a class is a folder and where there is no
        class. A dot in its name would make it a part of another sample, so such a name has its number in it."""
        if not self._keeps_paths:
            return b"%09d" % i
        folder, slash, name = self._source.path(i).rpartition(b"/")
        stem = name.rpartition(b".")[0]
        return folder + slash + (b"%s-%09d" % (stem.replace(b".", b"_"), i) if b"." in stem else stem)

    def sample(self, i: int) -> Sample:
        try:
            data, suffix, as_it_was = self._file(i)
        except MemoryError:
            raise
        except Exception as error:  # whatever its files, or whoever decodes them, have to say
            return Sample(b"", f"{self._source.name(i)} ({one_line(f'{type(error).__name__}: {error}')})")
        record = member(self.stem(i) + suffix.encode(), data)
        if self.classes is not None and not self._keeps_paths:
            record += member(self.stem(i) + b".cls", self.classes[self._source.labels[i]].encode())
        return Sample(record, as_it_was=as_it_was)

    def _file(self, i: int) -> tuple[bytes, str, str]:
        """What the image's file holds, its suffix, and why it was not made smaller."""
        with nullcontext() if isinstance(self._source, FileSource) else self._turn:
            data = self._source.file(i)
            image = None if data is not None else to_rgb(self._source.read(i))
        if image is not None:
            return *_encoded(_fit(image, self._short_side), "PNG", _noted(image)), ""
        name = self._source.name(i)
        suffix = Path(name).suffix if is_image_name(os.fsencode(name)) else _suffix(data)
        if self._short_side is None:
            return data, suffix, ""
        try:
            smaller = _smaller(data, self._short_side)
        except Exception as error:
            return data, suffix, f"{name} ({one_line(f'{type(error).__name__}: {error}')})"
        return (data, suffix, "") if smaller is None else (*smaller, "")


def member(name: bytes, data: bytes) -> bytes:
    """A file as it lies in a tar, the same at all times."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + data + bytes(-len(data) % BLOCK)


def _names_in_files(classes: Sequence[str]) -> tuple[str, ...]:
    """Names by which files beside images can tell all classes: numbers without leading zeros, none of them twice."""
    found: dict[str, None] = {}
    for k, name in enumerate(classes):
        text = read_label(b"cls", name.encode(errors="backslashreplace")).decode() or f"class {k}"
        while text in found:
            text = f"{text} ({k})"
        found[text] = None
    return tuple(found)


# ---- fewer pixels ----------------------------------------------------------------------------------------------------


def _smaller(data: bytes, short_side: int) -> tuple[bytes, str] | None:
    """The image in fewer pixels, and its suffix; None where it has no more than wanted.

    A JPEG stays one, all others are PNG. What cameras say of an image is kept: which side is up. Raises whatever Pillow
    raises, and ValueError for an image that would lose more than pixels.
    """
    with opened(data) as image:
        if min(image.size) <= short_side:
            return None
        if ImageMode.getmode(image.mode).typestr not in ("|u1", "|b1"):
            raise ValueError(f"its pixels have more than 8 bits: {image.mode}")
        AS_IT_IS.check_size(image)
        pixels = image if image.mode == "L" else to_rgb(image)
        kind = "JPEG" if image.format in _JPEG else "PNG"
        return _encoded(_fit(pixels, short_side), kind, _noted(image))


def _noted(image: Image.Image) -> bytes:
    """The EXIF of an image whose pixels were read; where something else says how it lies, with that in it."""
    exif, found = image.info.get("exif", b""), orientation(image)
    if found == UPRIGHT:
        return exif
    made = Image.Exif()
    made.load(exif)
    if made.get(TAG) == found:
        return exif
    made[TAG] = found
    return made.tobytes()


def _fit(image: Image.Image, short_side: int | None) -> Image.Image:
    if short_side is None or min(image.size) <= short_side:
        return image
    share = short_side / min(image.size)
    width, height = (max(short_side, round(side * share)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str, exif: bytes = b"") -> tuple[bytes, str]:
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **({"quality": _QUALITY} if kind == "JPEG" else {}))
    return file.getvalue(), _SUFFIX_OF[kind]


def _suffix(data: bytes) -> str:
    """Of a file that has no name."""
    try:
        with opened(data) as image:
            return _SUFFIX_OF[image.format]
    except Exception:  # it cannot be read in the tar either, and is reported then
        return ".jpg"
