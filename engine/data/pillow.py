"""Files opened by Pillow: in formats that are safe to read, without its own limit, and without its warnings."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # never all: Pillow starts Ghostscript for EPS


def opened(data: bytes) -> Image.Image:
    """The image in a file's bytes, whose pixels are read when they are used. Raises whatever Pillow raises."""
    silence()
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:  # Pillow's own text names an object in memory
        raise ValueError(f"not an image of the kinds {', '.join(_FORMATS)}") from None


def silence() -> None:
    """For the whole process: no limit that names no key (engine.data.decode has one), and no warning that names no
    file, of what is damaged in EXIF, which says nothing."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")
