import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torchvision import transforms
from torchvision.transforms import functional as F

from engine.data.decode import DRAWS, CenterCrop, Crops, Reading, crop_box, crop_draws, decode, to_rgb
from engine.data.jpeg import Jpeg
from engine.data.samples import _smaller
from tests.data.images import encoded, picture


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_every_kind_of_file_becomes_rgb(kind):
    image = to_rgb(decode(encoded(picture(9, 7), kind)))
    assert image.mode == "RGB"
    assert image.size == (9, 7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.full((2, 2), 200, np.uint16)) if mode == "I;16" else None
    image = to_rgb(grey or picture(2, 2).convert(mode))
    assert image.mode == "RGB"
    assert image.size == (2, 2)


def test_16_bit_grey_is_scaled_and_not_clipped():
    grey = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    expected = [[[v] * 3 for v in (0, 1, 128, 255)]]
    assert np.asarray(to_rgb(decode(encoded(grey, "PNG")))).tolist() == expected
    assert np.asarray(to_rgb(decode(encoded(grey, "TIFF")))).tolist() == expected
    assert np.asarray(to_rgb(Image.fromarray(np.asarray(grey).astype(np.int32)))).tolist() == expected


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(kind):
    with pytest.raises(ValueError, match="range is unknown"):
        to_rgb(Image.fromarray(np.full((2, 2), 1e6, kind)))


def test_grey_in_a_range_goes_from_black_to_white():
    """12 bits in 16-bit files, and real numbers, which are unreadable without one."""
    deep = Image.fromarray(np.array([[0, 1000, 2048, 4095, 65535]], np.uint16))
    reading, expected = Reading(range=(0, 4095)), [[[v] * 3 for v in (0, 62, 128, 255, 255)]]
    for kind in ("PNG", "TIFF"):
        assert np.asarray(to_rgb(decode(encoded(deep, kind)), reading)).tolist() == expected
    assert np.asarray(to_rgb(Image.fromarray(np.asarray(deep).astype(np.int32)), reading)).tolist() == expected
    real = Image.fromarray(np.array([[-np.inf, -1, -0.5, 1, 9]], np.float32))
    found = to_rgb(decode(encoded(real, "TIFF")), Reading(range=(-1, 1)))
    assert np.asarray(found).tolist() == [[[v] * 3 for v in (0, 0, 64, 255, 255)]]
    with pytest.raises(ValueError, match=r"pass data.range=\[black, white\]"):
        to_rgb(decode(encoded(real, "TIFF")))
    with pytest.raises(ValueError, match="not all numbers"):
        to_rgb(Image.fromarray(np.array([[0, np.nan]], np.float32)), reading)
    colour = picture(4, 4)
    assert np.array_equal(to_rgb(colour, reading), colour)
    crop = CenterCrop(1, 1.0, reading=reading)(decode(encoded(Image.new("I;16", (3, 3), 4095), "PNG")))
    assert crop.tolist() == [[[255]]] * 3
    out = np.empty((2, 3, 2, 2), np.uint8)
    form = Crops(2, 0.5, reading=reading)
    form.cut(decode(encoded(Image.new("I;16", (3, 3), 4095), "PNG")), form.draw(0, 0, torch.tensor([0]))[0], 0, 0, out)
    assert (out == 255).all()


def test_what_pillow_warns_of_is_not_said_as_it_names_no_file():
    """By all ways to open a file, each image of which is whole."""
    data = encoded(picture(4, 4), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    uses = [to_rgb, Jpeg.upright, lambda image: _smaller(image.data, 2)]
    for use in uses:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use(decode(data))
        assert not caught


def test_an_image_of_too_many_pixels_is_refused_by_the_key(monkeypatch):
    """Whatever Pillow's own limit is, by both ways to decode."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    out = np.empty((2, 3, 8, 8), np.uint8)
    for kind in ("JPEG", "PNG"):
        data = encoded(picture(20, 10), kind)
        for most in (199, 200):
            form = Crops(8, 0.5, reading=Reading(max_pixels=most))
            uses = [
                lambda image, form=form: form.cut(image, form.draw(0, 0, torch.tensor([0]))[0], 0, 0, out),
                lambda image, form=form: CenterCrop(8, reading=form.reading)(image),
            ]
            for use in uses:
                if most == 200:
                    use(decode(data))
                    continue
                words = r"^200 pixels are more than data.max_pixels \(199\); pass data.max_pixels=200$"
                with pytest.raises(ValueError, match=words):
                    use(decode(data))
    large = encoded(Image.new("1", (14000, 14000)), "PNG")
    with pytest.raises(ValueError, match=r"^196000000 pixels are more than data.max_pixels \(178956970\); pass"):
        to_rgb(decode(large))


def test_alpha_is_dropped_also_from_a_palette():
    image = picture(4, 4).convert("RGBA")
    image.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image)[:, :, :3])
    palette = picture(4, 4).quantize(4)
    data = encoded(palette, "PNG", transparency=b"\x00\x80\xff\xff")
    assert np.array_equal(np.asarray(to_rgb(decode(data))), np.asarray(palette.convert("RGB")))


def test_a_file_cut_short_is_refused():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encoded(picture(64, 64), "JPEG")
    to_rgb(decode(data))
    with pytest.raises(OSError, match="truncated"):
        to_rgb(decode(data[: len(data) // 2]))


@pytest.mark.parametrize("data", [b"", b"text", encoded(picture(4, 4), "TGA"), encoded(picture(4, 4), "EPS")])
def test_other_bytes_are_refused_in_words_that_repeat(data):
    with pytest.raises(ValueError, match=r"^not an image of the kinds JPEG, PNG"):
        decode(data)


unit = st.floats(0, 1, exclude_max=True)


@given(st.lists(unit, min_size=DRAWS, max_size=DRAWS), st.integers(1, 900), st.integers(1, 900), st.floats(0.01, 1))
def test_a_crop_lies_inside_the_image(draw_D, height, width, crop_min):
    top, left, h, w = crop_box(draw_D, height, width, crop_min)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


@pytest.mark.parametrize("size", [(60, 60), (500, 375), (100, 400), (400, 100)])
def test_crops_are_distributed_as_torchvisions(size):
    width, height = size
    torch.manual_seed(0)
    n, image = 4000, Image.new("RGB", size)
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ours = [crop_box(draw_D, height, width, 0.08) for draw_D in crop_draws(0, 0, torch.arange(n), 0).tolist()]
    for a, b in zip(np.sort(np.array(theirs), 0).T, np.sort(np.array(ours), 0).T, strict=True):
        values = np.union1d(a, b)
        gap = np.abs(np.searchsorted(a, values, "right") - np.searchsorted(b, values, "right")).max() / n
        assert gap < 1.95 * (2 / n) ** 0.5  # Kolmogorov-Smirnov, level 0.001; the draws are fixed


def test_a_crop_that_never_fits_falls_back_to_torchvisions_centre():
    for width, height in [(100, 10), (10, 100), (1, 1), (1, 50), (13, 12)]:
        # crop_min 1 and an extreme aspect ratio never fit.
        expected = None
        for seed in range(50):
            torch.manual_seed(seed)
            box = transforms.RandomResizedCrop.get_params(Image.new("RGB", (width, height)), [9.0, 9.0], [3 / 4, 4 / 3])
            assert expected in (None, tuple(box))
            expected = tuple(box)
        assert crop_box([0.5] * DRAWS, height, width, 9.0) == expected


def test_draws_belong_to_the_sample():
    sample_B = torch.tensor([5, 3, 900])
    together = crop_draws(1, 2, sample_B, 0)
    assert together.shape == (3, DRAWS)
    for b, sample in enumerate(sample_B):
        assert np.array_equal(together[b], crop_draws(1, 2, sample[None], 0)[0])
    for other in (crop_draws(2, 2, sample_B, 0), crop_draws(1, 3, sample_B, 0), crop_draws(1, 2, sample_B, 1)):
        assert not np.any(together == other)


@pytest.mark.parametrize("size", [(28, 28), (300, 200), (40, 500)])
def test_crops_are_bit_for_bit_torchvisions(size):
    image = picture(*size)
    crops, form = np.empty((2, 3, 32, 32), np.uint8), Crops(32, 0.2)
    (draw_2D,) = form.draw(0, 0, torch.tensor([4]))
    assert list(draw_2D) == [crop_draws(0, 0, torch.tensor([4]), view)[0].tolist() for view in (0, 1)]
    form.cut(image, draw_2D, 0, 4, crops)
    for draw_D, crop in zip(draw_2D, crops, strict=True):
        top, left, height, width = crop_box(draw_D, image.height, image.width, 0.2)
        expected = F.resized_crop(image, top, left, height, width, [32, 32])
        assert np.array_equal(crop, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("size", "side", "resized"), [((500, 375), 224, 256), ((60, 90), 224, 256), ((28, 28), 28, 32)]
)
def test_the_centre_crop_is_bit_for_bit_torchvisions(size, side, resized):
    image = picture(*size)
    expected = transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(side), transforms.PILToTensor()])
    assert torch.equal(CenterCrop(side)(image), expected(image))


def test_a_crop_fraction_of_one_sees_the_whole_width():
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    assert torch.equal(CenterCrop(28, 1.0)(image), torch.from_numpy(np.array(image).transpose(2, 0, 1)))
    assert not torch.equal(CenterCrop(28)(image), CenterCrop(28, 1.0)(image))
