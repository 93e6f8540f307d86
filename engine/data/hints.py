"""What some images show of how all of them should be read, in a line each that names the key."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from engine.data.contents import spread
from engine.data.decode import Reading
from engine.data.jpeg import Jpeg
from engine.data.orientation import UPRIGHT, orientation
from engine.data.source import Source

T = TypeVar("T")

_DECODED = 16  # images
_OPENED = 64  # images
_DARK = 65535 // 4  # 14 bits of 16, or fewer
_TURNED = 0.1  # of the images: whose cameras nobody turned afterwards; published sets have a handful


def hints(source: Source, reading: Reading) -> list[str]:
    """Lines on images that come out dark, or on their side, as they are read; those that cannot be read say nothing."""
    found = [] if reading.range else [about_dark(_of_some(source, _DECODED, brightest))]
    found += [] if reading.exif_orientation else [_about_orientation(_of_some(source, _OPENED, _is_turned))]
    return [line for line in found if line]


def about_dark(largest: Sequence[int]) -> str | None:
    """What some images of 16 bits show by the largest value of each; None where they are not dark."""
    if not largest or not 0 < max(largest) <= _DARK:
        return None
    white = (1 << max(largest).bit_length()) - 1
    return (
        f"16-bit images hold values up to {max(largest)} of 65535 ({len(largest):,} looked at), and so come out dark; "
        f"data.range=[0, {white}] makes them bright"
    )


def _about_orientation(turned: Sequence[bool]) -> str | None:
    if not any(turned) or sum(turned) < _TURNED * len(turned):
        return None
    return (
        f"{sum(turned)} of {len(turned)} looked at say that their camera was turned, and are taken as they lie; "
        "data.exif_orientation=true turns them upright"
    )


def _of_some(source: Source, most: int, look: Callable[[Image.Image | Jpeg], T | None]) -> list[T]:
    """What a look at each of some images finds, where it finds anything."""
    found = []
    for i in spread(len(source), most):
        try:
            found.append(look(source.read(i)))
        except Exception:  # it is reported where it is used
            continue
    return [each for each in found if each is not None]


def brightest(image: Image.Image | Jpeg) -> int | None:
    """The largest value of a grey image of 16 bits; None for another."""
    if isinstance(image, Jpeg) or not image.mode.startswith("I"):
        return None
    return int(np.asarray(image).max())


def lies(image: Image.Image | Jpeg) -> int:
    """How it says that it lies, as engine.data.orientation has it. To ask a PNG reads it, whatever its size."""
    return image.upright().orientation if isinstance(image, Jpeg) else orientation(image)


def _is_turned(image: Image.Image | Jpeg) -> bool:
    is_turned_anyway = isinstance(image, Image.Image) and image.format == "TIFF"  # by Pillow
    return not is_turned_anyway and lies(image) != UPRIGHT
