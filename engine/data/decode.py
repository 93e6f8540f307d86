"""What the CPU does to an image: decode it and cut crops out of it. All else happens on the device.

Shapes: V views, B samples, D random numbers per sample and view, S side of a crop in pixels.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import functional as F

from engine.data.jpeg import PILLOW, SIMPLEJPEG, Jpeg
from engine.data.philox import CROP, uniform_array
from engine.recipe.sections import Interpolation

_NEW_SUFFIXES = (".jfif", ".jpe", ".ppm", ".pgm", ".avif")  # since rules 2 (engine.data.rules)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *_NEW_SUFFIXES)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # never all: Pillow starts Ghostscript for EPS

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

_TRIES = 10
_ASPECTS = (3 / 4, 4 / 3)
DRAWS = 2 * _TRIES + 2  # D: area and aspect of each try, then top and left of the one that fits
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def is_image_name(name: bytes) -> bool:
    return name.lower().endswith(tuple(suffix.encode() for suffix in IMAGE_SUFFIXES))


def is_new_suffix(name: bytes) -> bool:
    """Whether former rules took an image of this name for something else."""
    return name.lower().endswith(tuple(suffix.encode() for suffix in _NEW_SUFFIXES))


def decode(data: bytes) -> Image.Image | Jpeg:
    """The image in a file's bytes, its first frame: RGB, or a JPEG that is decoded when its crops are cut.

    EXIF orientation is ignored, as is usual in this field. Raises whatever Pillow raises where the bytes are broken or
    cut short; of a JPEG, what is cut short is found when it is decoded.
    """
    return Jpeg.of(data) or _opened(data)


def _opened(data: bytes) -> Image.Image:
    try:
        return to_rgb(Image.open(io.BytesIO(data), formats=_FORMATS))
    except UnidentifiedImageError:  # Pillow's own text names an object in memory
        raise ValueError(f"not an image of the kinds {', '.join(_FORMATS)}") from None


def to_rgb(image: Image.Image | Jpeg) -> Image.Image:
    """RGB, by Pillow, from any mode with a meaning of its own: alpha is dropped, 16-bit grey is scaled to 8 bits."""
    if isinstance(image, Jpeg):
        return _opened(image.data)
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
    return uniform_array(seed, epoch, sample_B.numpy(), view, CROP, DRAWS)


def crop_box(draw_D: Sequence[float], height: int, width: int, crop_min: float) -> Box:
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
        pillow: Pillow decodes and resizes JPEG files too, as in runs that former versions began.
    """

    size: int
    crop_min: float
    views: int = 2
    interpolation: Interpolation = "bilinear"
    after_crop: Callable[[Image.Image, int, int], Image.Image] | None = None
    pillow: bool = False

    @property
    def decoder(self) -> str:
        """Of JPEG files; where Pillow resizes, a faster decoder gains nothing."""
        # Torch's bicubic crops are up to 14 levels away from Pillow's, its bilinear ones 1.
        return PILLOW if self.pillow or self.interpolation == "bicubic" else SIMPLEJPEG

    def draw(self, seed: int, epoch: int, sample_B: Tensor) -> list[Sequence[Sequence[float]]]:
        """The random numbers behind the crops of a whole batch: for each sample V rows of D."""
        draw_VBD = [crop_draws(seed, epoch, sample_B, view).tolist() for view in range(self.views)]
        return list(zip(*draw_VBD, strict=True))

    def cut(
        self,
        image: Image.Image | Jpeg,
        draw_VD: Sequence[Sequence[float]],
        epoch: int,
        sample: int,
        out_V3SS: np.ndarray,
    ) -> None:
        """Write the crops of an image, antialiased, into uint8 [V, 3, S, S]. Raises as `decode` where it is broken."""
        boxes = [crop_box(draw_D, image.height, image.width, self.crop_min) for draw_D in draw_VD]
        if isinstance(image, Jpeg) and self.decoder == SIMPLEJPEG:
            crops = _cut_from_jpeg(image, boxes, self.size)
        else:
            crops = _cut_by_pillow(to_rgb(image), boxes, self.size, self.interpolation)
        for crop_SS3, out_3SS in zip(crops, out_V3SS, strict=True):
            if self.after_crop is not None:
                crop_SS3 = np.asarray(self.after_crop(Image.fromarray(crop_SS3), epoch, sample))
            out_3SS[...] = crop_SS3.transpose(2, 0, 1)


def _cut_by_pillow(image: Image.Image, boxes: Sequence[Box], size: int, by: Interpolation) -> Iterator[np.ndarray]:
    """The pixels in the boxes of an RGB image, resized: each uint8 [S, S, 3]."""
    for top, left, height, width in boxes:
        # Cut, then resize: resize(box=...) would let pixels around the box bleed into its border.
        crop = image.crop((left, top, left + width, top + height))
        yield np.asarray(crop.resize((size, size), RESAMPLING[by]))


def _cut_from_jpeg(jpeg: Jpeg, boxes: Sequence[Box], size: int) -> Iterator[np.ndarray]:
    """The same by simplejpeg and torch, bilinear: up to 1 level from Pillow's where nothing is reduced."""
    reduction = reduction_for(boxes, size)
    try:
        pixels_HW3 = jpeg.pixels(reduction)
    except ValueError:  # Pillow says what is an image: it bears some damage, and has its own words for the rest
        pixels_HW3, reduction = np.asarray(to_rgb(jpeg)), 1
    for top, left, height, width in boxes:
        edges = (top, top + height, left, left + width)
        top, bottom, left, right = (round(edge / reduction) for edge in edges)
        # Torch would copy what is not contiguous too, three times as slowly.
        crop_HW3 = torch.from_numpy(pixels_HW3[top:bottom, left:right].copy())
        yield _resized(crop_HW3, size)


def reduction_for(boxes: Sequence[Box], size: int) -> int:
    """The part of a JPEG's height and width, 1, 2 or 4 times smaller, that suffices for crops of `size` pixels.

    Reduced boxes keep at least twice as many pixels along each side as their crops have. Then crops of the same boxes
    differ by .6 to .8 levels on average; with 1.5 times as many by .9 to 1, and an eighth of the height by 1.1.
    """
    least = min(side for _, _, height, width in boxes for side in (height, width))
    return next((reduction for reduction in (4, 2) if least >= 2 * reduction * size), 1)


def _resized(image_HW3: Tensor, size: int) -> np.ndarray:
    """Bilinear and antialiased: uint8 [S, S, 3]."""
    image_13HW = image_HW3[None].permute(0, 3, 1, 2)  # in channels_last, for which torch has fast code
    return interpolate(image_13HW, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class CenterCrop:
    """The view for evaluation: shorter side resized to size / fraction, the centre of `size` x `size` pixels kept."""

    size: int
    fraction: float = 224 / 256
    interpolation: Interpolation = "bilinear"

    def __call__(self, image: Image.Image | Jpeg) -> Tensor:
        """An RGB image, or a JPEG, to uint8 [3, S, S]; by Pillow, as numbers in papers are measured."""
        resized = F.resize(to_rgb(image), [round(self.size / self.fraction)], F.InterpolationMode(self.interpolation))
        return torch.from_numpy(np.array(F.center_crop(resized, [self.size, self.size])).transpose(2, 0, 1))
