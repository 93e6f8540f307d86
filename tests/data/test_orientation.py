"""Photographs that say how they lie, in every way that cameras and programs say it."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from engine.data.decode import CenterCrop, Crops, Reading, crop_box, decode, reduction_for, to_rgb
from engine.data.jpeg import Jpeg
from engine.data.orientation import TAG, orientation, turned_pixels
from tests.data.images import encoded, picture

UPRIGHT = Reading(exif_orientation=True)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def smooth(width: int, height: int) -> Image.Image:
    """Of which JPEG loses little, and no two corners are alike."""
    return picture(4, 3).resize((width, height), Image.Resampling.BICUBIC)


def noted(image: Image.Image, kind: str, number: int, **options) -> bytes:
    exif = Image.Exif()
    exif[TAG] = number
    return encoded(image, kind, exif=exif.tobytes(), **options)


def draws(form: Crops) -> Sequence[Sequence[float]]:
    return form.draw(0, 0, torch.tensor([0]))[0]


def cut(form: Crops, image: Image.Image | Jpeg) -> np.ndarray:
    crops = np.empty((form.views, 3, form.size, form.size), np.uint8)
    form.cut(image, draws(form), 0, 0, crops)
    return crops.astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_kind_of_file_is_turned_once_as_pillow_turns_it(kind):
    for number in range(1, 9):
        data = noted(smooth(40, 24), kind, number)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        found = to_rgb(decode(data), UPRIGHT)
        assert found.size == ((24, 40) if number >= 5 else (40, 24))
        assert np.array_equal(found, upright), (kind, number)
        assert np.array_equal(to_rgb(found, UPRIGHT), upright)
        if kind != "TIFF":  # Pillow turns it itself, and always has
            assert np.array_equal(to_rgb(decode(data)), Image.open(io.BytesIO(data)).convert("RGB"))
            assert to_rgb(decode(data)).size == (40, 24)


def test_jpeg_crops_are_those_of_a_file_that_lies_upright():
    """By both decoders; reduced ones as near as those of files that nothing turns."""
    photograph = Image.fromarray(load_sample_images().images[0])  # 640 x 427
    for number in range(1, 9):
        jpeg = decode(noted(photograph, "JPEG", number))
        assert isinstance(jpeg, Jpeg)
        upright, whole = jpeg.upright(), to_rgb(jpeg, UPRIGHT)
        assert (upright.width, upright.height) == whole.size
        assert np.array_equal(turned_pixels(upright.pixels(), number), whole)
        assert upright.pixels(4).shape == jpeg.pixels(4).shape == (107, 160, 3)
        for size, reduction, near in ((224, 1, 0.5), (64, 2, 1.5), (40, 4, 1.5)):
            ours, theirs = (cut(Crops(size, 0.9, pillow=pillow, reading=UPRIGHT), jpeg) for pillow in (False, True))
            form = Crops(size, 0.9, pillow=True)
            boxes = [crop_box(draw_D, whole.height, whole.width, 0.9) for draw_D in draws(form)]
            assert reduction_for(boxes, size) == reduction
            assert np.array_equal(theirs, cut(form, whole))
            assert np.abs(ours - theirs).mean() < near, (number, size)
            assert (np.abs(cut(form, jpeg) - theirs).mean() > 8) == (number > 1)
            assert torch.equal(CenterCrop(size, reading=UPRIGHT)(jpeg), CenterCrop(size)(whole))


def test_pixels_are_turned_as_pillow_turns_images():
    image = picture(5, 3)
    for number in range(9):
        file = Image.open(io.BytesIO(noted(image, "PNG", number)))
        assert np.array_equal(turned_pixels(np.asarray(image), number), ImageOps.exif_transpose(file))


def test_xmp_says_it_too_and_what_is_damaged_says_nothing():
    image = smooth(40, 24)
    assert decode(encoded(image, "JPEG", xmp=XMP)).upright().orientation == 6
    assert orientation(decode(encoded(image, "WEBP", xmp=XMP))) == 6
    for number in (0, 9, 300):
        assert decode(noted(image, "JPEG", number)).upright().orientation == 1
    whole, random = noted(image, "JPEG", 6), np.random.default_rng(0)
    begin = whole.index(b"Exif\0\0")
    for _ in range(200):
        data = bytearray(whole)
        data[begin + 6 + random.integers(24)] = random.integers(256)
        jpeg = decode(bytes(data))
        upright = jpeg.upright()
        assert np.array_equal(turned_pixels(upright.pixels(), upright.orientation), to_rgb(jpeg, UPRIGHT))


def test_nothing_is_looked_for_where_nothing_is_turned(monkeypatch):
    def fail(*_):
        raise AssertionError("an orientation was looked for")

    for name in ("decode.turned", "jpeg.orientation"):
        monkeypatch.setattr(f"engine.data.{name}", fail)
    for kind in ("JPEG", "PNG"):
        image = decode(noted(smooth(40, 24), kind, 6))
        assert cut(Crops(8, 0.5), image).any()
        assert CenterCrop(8)(image).any()
    unnoted = decode(encoded(smooth(40, 24), "JPEG"))
    assert cut(Crops(8, 0.5, reading=UPRIGHT), unnoted).any()
