"""What the CPU does to an image: decode it and cut crops out of it. All else happens on the device.

Shapes: V views, B samples, D random numbers per sample and view, S side of a crop in pixels.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as F

from engine.data.philox import CROP, uniform
from engine.recipe.sections import Interpolation

_NEW_SUFFIXES = (".jfif", ".jpe", ".ppm", ".pgm", ".avif")  # since rules 2 (engine.data.rules)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *_NEW_SUFFIXES)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # never all: Pillow starts Ghostscript for EPS

_TRIES = 10
_ASPECTS = (3 / 4, 4 / 3)
DRAWS = 2 * _TRIES + 2  # D: area and aspect of each try, then top and left of the one that fits
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def is_image_name(name: bytes) -> bool:
    return name.lower().endswith(tuple(suffix.encode() for suffix in IMAGE_SUFFIXES))


def is_new_suffix(name: bytes) -> bool:
    """Whether former rules took an image of this name for something else."""
    return name.lower().endswith(tuple(suffix.encode() for suffix in _NEW_SUFFIXES))


def decode(data: bytes) -> Image.Image:
    """The RGB image in a file's bytes, its first frame. EXIF orientation is ignored, as is usual in this field.

    Raises whatever Pillow raises where the bytes are broken or cut short.
    """
    try:
        return to_rgb(Image.open(io.BytesIO(data), formats=_FORMATS))
    except UnidentifiedImageError:  # Pillow's own text names an object in memory
        raise ValueError(f"not an image of the kinds {', '.join(_FORMATS)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode that has a meaning of its own: alpha is dropped, 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose range is unknown")
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow clips here, so that most of a 16-bit scan turns white. Mode I is 32 bits wide but may hold 16-bit grey.
    grey_HW = np.asarray(image).astype(np.int64)
    if grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise ValueError("pixels are 32-bit numbers, whose range is unknown")
    return Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8)).convert("RGB")


def crop_draws(seed: int, epoch: int, sample_B: Tensor, view: int) -> np.ndarray:
    """The random numbers behind the crops of a whole batch, for `crop_box`: float64 [B, D] in [0, 1)."""
    return uniform(seed, epoch, sample_B, view, CROP, DRAWS).numpy()


def crop_box(draw_D: Sequence[float], height: int, width: int, crop_min: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of one RandomResizedCrop, with torchvision's distribution.

    The area is uniform from crop_min to 1 of the image's, the aspect ratio log-uniform from 3/4 to 4/3; the first of
    ten tries that fits is placed uniformly. If none fits: the largest centred box of an allowed aspect ratio.
    """
    low, high = math.log(_ASPECTS[0]), math.log(_ASPECTS[1])
    for k in range(_TRIES):
        area = height * width * (crop_min + (1 - crop_min) * draw_D[2 * k])
        aspect = math.exp(low + (high - low) * draw_D[2 * k + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw_D[-2] * (height - h + 1)), int(draw_D[-1] * (width - w + 1)), h, w
    w = min(width, round(height * _ASPECTS[1]))
    h = min(height, round(width / _ASPECTS[0]))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class Crops:
    """The random crops of a training image.

    Args:
        size: S.
        crop_min: the least area of a crop, as a share of the image's.
        views: V, how many crops of an image.
        after_crop: what else is done to a crop, given (crop, epoch, sample).
    """

    size: int
    crop_min: float
    views: int = 2
    interpolation: Interpolation = "bilinear"
    after_crop: Callable[[Image.Image, int, int], Image.Image] | None = None

    def draw(self, seed: int, epoch: int, sample_B: Tensor) -> list[Sequence[Sequence[float]]]:
        """The random numbers behind the crops of a whole batch: for each sample V rows of D."""
        draw_VBD = [crop_draws(seed, epoch, sample_B, view).tolist() for view in range(self.views)]
        return list(zip(*draw_VBD, strict=True))

    def cut(
        self, image: Image.Image, draw_VD: Sequence[Sequence[float]], epoch: int, sample: int, out_V3SS: np.ndarray
    ) -> None:
        """Write the crops of an RGB image, antialiased, into uint8 [V, 3, S, S]."""
        for draw_D, out_3SS in zip(draw_VD, out_V3SS, strict=True):
            top, left, height, width = crop_box(draw_D, image.height, image.width, self.crop_min)
            # Cut, then resize: resize(box=...) would let pixels around the box bleed into its border.
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize((self.size, self.size), RESAMPLING[self.interpolation])
            crop = crop if self.after_crop is None else self.after_crop(crop, epoch, sample)
            out_3SS[...] = np.asarray(crop).transpose(2, 0, 1)


@dataclass(frozen=True)
class CenterCrop:
    """The view for evaluation: shorter side resized to size / fraction, the centre of `size` x `size` pixels kept."""

    size: int
    fraction: float = 224 / 256
    interpolation: Interpolation = "bilinear"

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image to uint8 [3, S, S]."""
        resized = F.resize(image, [round(self.size / self.fraction)], F.InterpolationMode(self.interpolation))
        return torch.from_numpy(np.array(F.center_crop(resized, [self.size, self.size])).transpose(2, 0, 1))
