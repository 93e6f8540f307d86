"""JPEG files, decoded by libjpeg-turbo alone and cut by torch, are measured by what Pillow makes of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from engine.data.decode import CenterCrop, Crops, crop_box, decode, reduction_for, to_rgb
from engine.data.jpeg import PILLOW, SIMPLEJPEG, Jpeg
from tests.data.images import encoded, picture

SIZES = (28, 96, 224)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427


@pytest.fixture(scope="module")
def files(photographs) -> list[bytes]:
    """Of every subsampling and of three qualities, grey and progressive ones too, of odd sizes."""
    random, found = np.random.default_rng(0), []
    for k in range(12):
        width, height = random.integers(200, 641), random.integers(150, 428)
        image = photographs[k % 2].crop((0, 0, width, height)).convert("L" if k % 4 == 3 else "RGB")
        found.append(encoded(image, "JPEG", quality=(60, 80, 95)[k // 4], subsampling=k % 3, progressive=k % 5 == 4))
    return found


def cut(form: Crops, image: Image.Image | Jpeg, sample: int = 0) -> np.ndarray:
    """int64 [V, 3, S, S], to be subtracted."""
    crops = np.empty((form.views, 3, form.size, form.size), np.uint8)
    form.cut(image, form.draw(0, 0, torch.tensor([sample]))[0], 0, sample, crops)
    return crops.astype(int)


def test_crops_are_within_two_levels_of_pillows_and_half_a_level_on_average(files, monkeypatch):
    monkeypatch.setattr("engine.data.decode.reduction_for", lambda boxes, size: 1)
    differences = []
    for sample in range(60):
        image, size = decode(files[sample % len(files)]), SIZES[sample % len(SIZES)]
        ours, theirs = (cut(Crops(size, 0.08, pillow=pillow), image, sample) for pillow in (False, True))
        differences.append(np.abs(ours - theirs))
    assert max(each.max() for each in differences) in (1, 2)  # 0: nothing was measured
    assert max(each.mean() for each in differences) < 0.5


def test_every_pixel_is_pillows(files):
    for data in files:
        assert isinstance(decode(data), Jpeg)
        assert np.array_equal(decode(data).pixels(), Image.open(io.BytesIO(data)).convert("RGB"))


def outcome(read) -> bytes | str:
    try:
        return np.asarray(read()).tobytes()
    except Exception as error:
        return str(error)


@pytest.mark.parametrize("seed", range(4))
def test_of_damaged_files_pillow_says_which_can_be_read(photographs, seed):
    random, form, found = np.random.default_rng(seed), Crops(8, 0.2), []
    whole = encoded(photographs[0].crop((90, 90, 131, 121)), "JPEG", progressive=seed == 3, restart_marker_blocks=seed)
    for _ in range(150):
        data = bytearray(whole[: random.integers(1, len(whole))] if random.random() < 0.3 else whole)
        for place in random.integers(len(data), size=random.integers(3)):
            data[place] = random.integers(256)
        ours = outcome(lambda data=bytes(data): cut(form, decode(data)))
        theirs = outcome(lambda data=bytes(data): cut(form, to_rgb(Image.open(io.BytesIO(data), formats=["JPEG"]))))
        found.append((type(ours), type(theirs)))
        if isinstance(ours, str) and "cannot identify" not in theirs:
            assert ours == theirs
    assert all(ours == theirs for ours, theirs in found)
    assert len(set(found)) == 2


def test_what_is_no_usual_jpeg_is_pillows(photographs, monkeypatch):
    image = photographs[0].crop((0, 0, 90, 60))
    for data in (encoded(image.convert("CMYK"), "JPEG"), encoded(image, "PNG"), encoded(image, "JPEG", keep_rgb=True)):
        assert isinstance(decode(data), Image.Image)
        assert np.array_equal(cut(Crops(32, 0.2), decode(data)), cut(Crops(32, 0.2, pillow=True), decode(data)))
    data = encoded(image, "JPEG")
    assert isinstance(decode(data), Jpeg)
    monkeypatch.setattr("engine.data.jpeg._LARGE", 90 * 60 - 1)
    assert isinstance(decode(data), Image.Image)


def test_bicubic_crops_and_the_centre_crop_are_pillows(files):
    bicubic = Crops(96, 0.2, interpolation="bicubic")
    assert (bicubic.decoder, Crops(96, 0.2).decoder, Crops(96, 0.2, pillow=True).decoder) == (
        PILLOW,
        SIMPLEJPEG,
        PILLOW,
    )
    for data in files:
        image = to_rgb(decode(data))
        assert np.array_equal(cut(bicubic, decode(data)), cut(bicubic, image))
        assert torch.equal(CenterCrop(96)(decode(data)), CenterCrop(96)(image))


def test_what_comes_after_a_crop_gets_it_as_an_image(files):
    def turned(crop: Image.Image, epoch: int, sample: int) -> Image.Image:
        assert (crop.mode, crop.size, epoch, sample) == ("RGB", (32, 32), 0, 7)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    plain, after = (cut(Crops(32, 0.2, after_crop=after), decode(files[0]), 7) for after in (None, turned))
    assert np.array_equal(plain[..., ::-1], after)


# ---- reduced decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "reduction"), [(64, 2), (32, 4)])
def test_reduced_crops_are_within_a_level_of_pillows_on_average(photographs, size, reduction):
    """The photographs, as sharp as they are: made smaller or larger, they would differ less."""
    differences = []
    for sample in range(24):
        jpeg = decode(encoded(photographs[sample % 2], "JPEG", quality=90))
        (draw_D,) = Crops(size, 0.4, 1).draw(0, 0, torch.tensor([sample]))[0]
        box = top, left, height, width = crop_box(draw_D, jpeg.height, jpeg.width, 0.4)
        if reduction_for([box], size) != reduction:
            continue
        edges = [round(edge / reduction) * reduction for edge in (left, top, left + width, top + height)]
        expected = to_rgb(jpeg).crop(edges).resize((size, size), Image.Resampling.BILINEAR)
        differences.append(np.abs(cut(Crops(size, 0.4, 1), jpeg, sample)[0] - np.asarray(expected).transpose(2, 0, 1)))
    assert len(differences) > 12
    assert 0 < np.mean(differences) < 1


def test_a_jpeg_is_decoded_no_smaller_than_its_smallest_crop_allows():
    wide = (0, 0, 800, 1200)
    assert [reduction_for([wide], size) for size in (100, 101, 200, 201, 50)] == [4, 2, 2, 1, 4]
    assert reduction_for([wide, (0, 0, 1200, 300)], 100) == 1
    jpeg = decode(encoded(picture(37, 21), "JPEG"))
    assert [jpeg.pixels(reduction).shape for reduction in (1, 2, 4)] == [(21, 37, 3), (11, 19, 3), (6, 10, 3)]
    cut(Crops(2, 1.0), jpeg)  # boxes that end where the reduced image does
