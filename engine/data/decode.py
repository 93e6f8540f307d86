"""What the CPU does to an image: decode it and cut crops out of it. All else happens on the device.

Shapes: V views, B samples, D random numbers per sample and view, S side of a crop in pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import functional as F

from engine.data.jpeg import PILLOW, SIMPLEJPEG, Jpeg
from engine.data.orientation import Box, lying_box, turned, turned_pixels
from engine.data.philox import CROP, uniform_array
from engine.data.pillow import opened
from engine.recipe.sections import Data, Interpolation

_NEW_SUFFIXES = (".jfif", ".jpe", ".ppm", ".pgm", ".avif")  # since rules 2 (engine.data.rules)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *_NEW_SUFFIXES)

_TRIES = 10
_ASPECTS = (3 / 4, 4 / 3)
DRAWS = 2 * _TRIES + 2  # D: area and aspect of each try, then top and left of the one that fits
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def is_image_name(name: bytes) -> bool:
    return name.lower().endswith(tuple(suffix.encode() for suffix in IMAGE_SUFFIXES))


def is_new_suffix(name: bytes) -> bool:
    """Whether former rules took an image of this name for something else."""
    return name.lower().endswith(tuple(suffix.encode() for suffix in _NEW_SUFFIXES))


_MOST_PIXELS = 178_956_970  # Pillow's own limit


@dataclass(frozen=True)
class Reading:
    """What the pixels of a file stand for, as a recipe's `data` says it.

    exif_orientation: photographs are turned as their cameras were held. range: what is black and what is white in grey
    images of more than 8 bits or of real numbers; None: 16 bits as they are. max_pixels: of an image that is read.
    """

    exif_orientation: bool = False
    range: tuple[float, float] | None = None
    max_pixels: int = _MOST_PIXELS

    @classmethod
    def of(cls, data: Data) -> "Reading":
        return cls(data.exif_orientation, data.range, data.max_pixels or _MOST_PIXELS)

    def check_size(self, image: Image.Image | Jpeg) -> None:
        """Raises ValueError for an image that has too many pixels."""
        pixels = image.width * image.height
        if pixels > self.max_pixels:
            raise ValueError(
                f"{pixels} pixels are more than data.max_pixels ({self.max_pixels}); pass data.max_pixels={pixels}"
            )


AS_IT_IS = Reading()


def decode(data: bytes) -> Image.Image | Jpeg:
    """The image in a file's bytes, its first frame, whose pixels are read when its crops are cut.

    Raises whatever Pillow raises where the bytes are no image; what is broken or cut short is found by `to_rgb`.
    """
    return Jpeg.of(data) or opened(data)


def to_rgb(image: Image.Image | Jpeg, reading: Reading = AS_IT_IS) -> Image.Image:
    """RGB, by Pillow, from any mode with a meaning of its own: alpha is dropped, 16-bit grey is scaled to 8 bits.

    Raises whatever Pillow raises where the file is broken or cut short.
    """
    reading.check_size(image)
    if isinstance(image, Jpeg):
        image = opened(image.data)
    image.load()
    rgb = _as_rgb(image, reading.range)
    return turned(rgb) if reading.exif_orientation else rgb


def read_whole(image: Image.Image | Jpeg, reading: Reading = AS_IT_IS) -> None:
    """Read every pixel, for what is wrong with them alone. Raises as `to_rgb`."""
    reading.check_size(image)
    if isinstance(image, Jpeg):
        try:
            image.pixels(4)  # fewer pixels, of all that the file holds
            return
        except ValueError:  # Pillow says what is an image, as where crops are cut
            pass
    to_rgb(image, replace(reading, exif_orientation=False))


def _as_rgb(image: Image.Image, grey: tuple[float, float] | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_16_bit(image) if grey is None else _from_range(image, *grey)
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow clips here, so that most of a 16-bit scan turns white. Mode I is 32 bits wide but may hold 16-bit grey.
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose range is unknown; pass data.range=[black, white]")
    grey_HW = np.asarray(image).astype(np.int64)
    if grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise ValueError("pixels are 32-bit numbers, whose range is unknown; pass data.range=[black, white]")
    return Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8)).convert("RGB")


def _from_range(image: Image.Image, black: float, white: float) -> Image.Image:
    """Grey from black to white in equal steps; what is darker or brighter is black or white."""
    grey_HW = np.asarray(image).astype(np.float64)
    if np.isnan(grey_HW).any():
        raise ValueError("pixels are not all numbers")
    level_HW = (grey_HW.clip(black, white) - black) * (255 / (white - black))
    return Image.fromarray(level_HW.round().astype(np.uint8)).convert("RGB")


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
        reading: what the pixels of files stand for.
    """

    size: int
    crop_min: float
    views: int = 2
    interpolation: Interpolation = "bilinear"
    after_crop: Callable[[Image.Image, int, int], Image.Image] | None = None
    pillow: bool = False
    reading: Reading = AS_IT_IS

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
        self.reading.check_size(image)
        if isinstance(image, Jpeg) and self.decoder == SIMPLEJPEG:
            image = image.upright() if self.reading.exif_orientation else image
        else:
            image = to_rgb(image, self.reading)
        boxes = [crop_box(draw_D, image.height, image.width, self.crop_min) for draw_D in draw_VD]
        if isinstance(image, Jpeg):
            crops = _cut_from_jpeg(image, boxes, self.size, self.reading)
        else:
            crops = _cut_by_pillow(image, boxes, self.size, self.interpolation)
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


def _cut_from_jpeg(jpeg: Jpeg, boxes: Sequence[Box], size: int, reading: Reading) -> Iterator[np.ndarray]:
    """The same by simplejpeg and torch, bilinear: up to 1 level from Pillow's where nothing is reduced."""
    reduction = reduction_for(boxes, size)
    try:
        pixels_HW3 = jpeg.pixels(reduction)
    except ValueError:  # Pillow says what is an image: it bears some damage, and has its own words for the rest
        pixels_HW3, reduction = np.asarray(to_rgb(jpeg, replace(reading, exif_orientation=False))), 1
    for box in boxes:
        # What lies is cut and made small before it is turned: turning the whole would take as long as decoding it.
        top, left, height, width = lying_box(box, jpeg.height, jpeg.width, jpeg.orientation)
        edges = (top, top + height, left, left + width)
        top, bottom, left, right = (round(edge / reduction) for edge in edges)
        # Torch would copy what is not contiguous too, three times as slowly.
        crop_HW3 = torch.from_numpy(pixels_HW3[top:bottom, left:right].copy())
        yield turned_pixels(_resized(crop_HW3, size), jpeg.orientation)


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
    reading: Reading = AS_IT_IS

    @property
    def resized_side(self) -> int:
        """Of the shorter side of an image before its centre is cut out, in pixels."""
        return round(self.size / self.fraction)

    def __call__(self, image: Image.Image | Jpeg) -> Tensor:
        """An image of any mode, or a JPEG, to uint8 [3, S, S]; by Pillow, as numbers in papers are measured."""
        by = F.InterpolationMode(self.interpolation)
        resized = F.resize(to_rgb(image, self.reading), [self.resized_side], by)
        return torch.from_numpy(np.array(F.center_crop(resized, [self.size, self.size])).transpose(2, 0, 1))
