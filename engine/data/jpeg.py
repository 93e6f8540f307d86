"""JPEG files by libjpeg-turbo alone (simplejpeg): faster than Pillow around the same library, and with less detail
where less will do."""

import math
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import simplejpeg
from PIL import Image

# What makes a run's crops of JPEG files: of runs that begin now, and of those of former versions.
DECODERS = SIMPLEJPEG, PILLOW = "simplejpeg", "pillow"


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file that is decoded once it is known how large its crops are. height, width: of the whole, in pixels."""

    data: bytes
    height: int
    width: int

    @classmethod
    def of(cls, data: bytes) -> "Jpeg | None":
        """None where the bytes are left to Pillow: other kinds of files, damage, CMYK, a size that Pillow warns of."""
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return None
        usual = colours in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
        return cls(data, height, width) if usual else None

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """uint8 [height, width, 3], both divided by 1, 2 or 4 and rounded up. Raises ValueError at any damage."""
        height, width = -(-self.height // reduction), -(-self.width // reduction)
        return simplejpeg.decode_jpeg(self.data, "RGB", min_height=height, min_width=width)


def with_version(decoder: str) -> str:
    """As a checkpoint has it."""
    return f"{decoder} {version(decoder)}"


def without_version(decoder: str) -> str:
    return decoder.partition(" ")[0]
