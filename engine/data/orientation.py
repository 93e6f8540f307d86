"""How a photograph lies in its file, 1 to 8 as EXIF (or XMP) numbers it, and how it is turned upright."""

import numpy as np
from PIL import Image
from PIL.Image import Transpose

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

TAG = 0x0112
UPRIGHT = 1
# Whether rows and columns change places; then whether rows, and columns, are read backwards.
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_BY_PILLOW = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_NOTES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow looks for an orientation


def orientation(image: Image.Image) -> int:
    """1 where an image says nothing that can be understood; of a TIFF that is loaded too, as Pillow has turned it."""
    try:
        found = image.getexif().get(TAG)
    except Exception:  # damaged notes make Pillow raise nearly anything; the pixels are not the worse for it
        return UPRIGHT
    return found if found in _TURNS else UPRIGHT


def lies_on_its_side(orientation: int) -> bool:
    """Whether height and width change places."""
    return orientation >= 5


def turned(image: Image.Image) -> Image.Image:
    """Upright; it says so itself, so that it is not turned again."""
    found = orientation(image)
    if found == UPRIGHT:
        return image
    upright = image.transpose(_BY_PILLOW[found])
    for note in _NOTES:
        upright.info.pop(note, None)
    return upright


def turned_pixels(pixels_HW3: np.ndarray, orientation: int) -> np.ndarray:
    """The same of pixels [H, W, 3] that lie so; they are not copied."""
    transposed, rows, columns = _TURNS.get(orientation, (False, False, False))
    if transposed:
        pixels_HW3 = pixels_HW3.swapaxes(0, 1)
    return pixels_HW3[:: -1 if rows else 1, :: -1 if columns else 1]


def lying_box(box: Box, height: int, width: int, orientation: int) -> Box:
    """Where a box of the upright image, of that height and width, is in the one that lies."""
    top, left, h, w = box
    transposed, rows, columns = _TURNS.get(orientation, (False, False, False))
    top, left = height - top - h if rows else top, width - left - w if columns else left
    return (left, top, w, h) if transposed else (top, left, h, w)
