"""JPEG files by libjpeg-turbo alone (simplejpeg): faster than Pillow around the same library, and with less detail
where less will do."""

from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import simplejpeg

from engine.data.orientation import UPRIGHT, lies_on_its_side, orientation
from engine.data.pillow import opened

# What makes a run's crops of JPEG files: of runs that begin now, and of those of former versions.
DECODERS = SIMPLEJPEG, PILLOW = "simplejpeg", "pillow"

_LARGE = 89_478_485  # pixels; Pillow warns of more
_MARKS = (b"Exif\0\0", b"tiff:Orientation")  # in files that may say how they lie


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file that is decoded once it is known how large its crops are.

    height, width: of the whole, in pixels. orientation: by which they are those of the image upright; its pixels lie.
    """

    data: bytes
    height: int
    width: int
    orientation: int = UPRIGHT

    @classmethod
    def of(cls, data: bytes) -> "Jpeg | None":
        """None where the bytes are left to Pillow: other kinds of files, damage, CMYK, a size that Pillow warns of."""
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return None
        usual = colours in ("YCbCr", "Gray") and height * width <= _LARGE
        return cls(data, height, width) if usual else None

    def upright(self) -> "Jpeg":
        """The same with height and width as its camera was held."""
        found = self._noted()
        if found == self.orientation:
            return self
        sides = (self.width, self.height) if lies_on_its_side(found) else (self.height, self.width)
        return replace(self, height=sides[0], width=sides[1], orientation=found)

    def _noted(self) -> int:
        if not any(mark in self.data for mark in _MARKS):  # most say nothing, and are not opened for it
            return UPRIGHT
        try:
            return orientation(opened(self.data))
        except Exception:  # the pixels say whether the file can be read
            return UPRIGHT

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """As they lie in the file: uint8 [height, width, 3], both divided by 1, 2 or 4 and rounded up.

        Raises ValueError at any damage.
        """
        sides = (self.width, self.height) if lies_on_its_side(self.orientation) else (self.height, self.width)
        height, width = (-(-side // reduction) for side in sides)
        return simplejpeg.decode_jpeg(self.data, "RGB", min_height=height, min_width=width)


def with_version(decoder: str) -> str:
    """As a checkpoint has it."""
    return f"{decoder} {version(decoder)}"


def without_version(decoder: str) -> str:
    return decoder.partition(" ")[0]
