from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from engine.data import augment
from engine.data.augment import BRIGHTNESS, CONTRAST, SATURATION, Augment, Flip
from engine.recipe import sections

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}

VALUES = sections.Augment(
    crop_min=0.08,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_sigma=(0.1, 2.0),
    blur_probability=(1.0, 0.1),
    solarize_probability=(0.0, 0.2),
    flip_probability=0.5,
    mean=MEAN,
    std=STD,
)
OFF = replace(
    VALUES,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarize_probability=(0.0, 0.0),
    flip_probability=0.0,
)


def augmenting(values: sections.Augment = VALUES, dtype: torch.dtype = torch.float64, **changed) -> Augment:
    return Augment(replace(values, **changed), 7, dtype)


FULL = augmenting()


def random_images(count, side, dtype=torch.float64):
    """Noise, and in the first four every colour where hue's formula has a corner: greys, primaries, black, white."""
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return torch.cat([images[:1, :1].expand(1, 3, -1, -1), images[1:4].round(), images[4:]])


def random_crops(count, side):
    return torch.randint(0, 256, (2, count, 3, side, side), generator=torch.Generator().manual_seed(2)).byte()


def photograph(side):
    """A smooth picture with edges, uint8 [3, side, side]."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc = ((row - side / 3) ** 2 + (column - side / 2) ** 2 < (side / 4) ** 2) * 90
    planes = [row * 120 / side + disc, column * 160 / side + (row > side / 2) * 60, 200 - disc - column * 50 / side]
    return torch.stack(planes).clamp(0, 255).byte()


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def column(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)[:, None]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("op", "theirs"),
    [(BRIGHTNESS, F.adjust_brightness), (CONTRAST, F.adjust_contrast), (SATURATION, F.adjust_saturation)],
)
def test_blends_are_torchvisions(op, theirs, dtype):
    images, factors = random_images(6, 9, dtype), [0.0, 0.6, 1.0, 1.4, 2.0, 0.8]
    ours = torch.cat(augment.blend(images.split(1, 1), torch.full((6, 1), op), column(factors, dtype)), 1)
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_hue_grayscale_and_solarize_are_torchvisions(dtype):
    images, shifts = random_images(8, 9, dtype), [-0.5, -0.1, 0.0, 0.1, 0.25, 0.5, -0.37, 1 / 3]
    limits = {"rtol": 0, "atol": TOLERANCE[dtype]}
    hues = torch.stack([F.adjust_hue(image, shift) for image, shift in zip(images, shifts, strict=True)])
    ours = torch.cat(augment.adjust_hue(images.split(1, 1), column(shifts, dtype)), 1)
    torch.testing.assert_close(ours, hues, **limits)
    torch.testing.assert_close(augment.grayscale(images.split(1, 1)), F.rgb_to_grayscale(images, 1), **limits)
    on = column([1, 0] * 4, dtype)
    solarized = torch.where(on[:, :, None, None] == 1, F.solarize(images, 0.5), images)
    torch.testing.assert_close(augment.solarize(images, on), solarized, **limits)


def test_solarize_is_pils_at_every_level():
    levels = torch.arange(256).byte().view(1, 16, 16).expand(3, 16, 16)
    ours = augment.solarize(levels[None].double() / 255, column([1.0]))[0] * 255
    pil = from_pil(ImageOps.solarize(to_pil(levels), 128))
    torch.testing.assert_close(ours, pil.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("radius", [3, 8])
def test_blur_is_torchvisions_with_edge_pixels_repeated(dtype, radius):
    images, sigmas = random_images(5, 12, dtype), [0.1, 0.5, 0.9, 1.5, 2.0]
    ours = augment.gaussian_blur(images, column(sigmas, dtype), radius)
    for image, sigma, blurred in zip(images, sigmas, ours, strict=True):
        padded = torch.nn.functional.pad(image[None], [radius] * 4, mode="replicate")[0]
        expected = F.gaussian_blur(padded, [2 * radius + 1] * 2, [sigma] * 2)[:, radius:-radius, radius:-radius]
        torch.testing.assert_close(blurred, expected, rtol=0, atol=TOLERANCE[dtype])


def blur_by_whole_matrices(x_BCSS, sigma_B1, radius):
    """The same sums as products of whole images with a banded [S, S] matrix each."""
    (B, _, S, _), tap_K = x_BCSS.shape, torch.arange(-radius, radius + 1)
    weight_BK = torch.exp(-0.5 * (tap_K / sigma_B1.clamp_min(1e-3)) ** 2)
    weight_BK = weight_BK * (weight_BK > 1e-12)
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    source_KS1 = (tap_K[:, None, None] + torch.arange(S)[:, None]).clamp(0, S - 1)
    matrix_BSS = (weight_BK @ (source_KS1 == torch.arange(S)).to(x_BCSS.dtype).flatten(1)).view(B, 1, S, S)
    return matrix_BSS @ x_BCSS @ matrix_BSS.mT


@pytest.mark.parametrize("side", [1, 28, 96, 128, 129, 150, 224])
@pytest.mark.parametrize("radius", [0, 3, 8, 20])
def test_blur_in_windows_is_a_product_with_whole_matrices(side, radius):
    images, sigma_B1 = random_images(5, side), column([0.0, 0.1, 0.9, 2.0, 5.0])
    ours = augment.gaussian_blur(images, sigma_B1, radius)
    expected = blur_by_whole_matrices(images, sigma_B1, radius)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert torch.equal(ours[0], images[0])  # a sigma of 0 changes nothing


@pytest.mark.parametrize("side", [28, 150])
def test_no_images_are_blurred_into_none(side):
    assert augment.gaussian_blur(random_images(5, side)[:0], column([]), 8).shape == (0, 3, side, side)


@pytest.mark.parametrize("side", [28, 150])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blur_is_the_same(side, backend):
    images, sigma_B1 = random_images(5, side), column([0.0, 0.1, 0.9, 1.5, 2.0])
    compiled = torch.compile(augment.gaussian_blur, fullgraph=True, dynamic=False, backend=backend)
    expected = augment.gaussian_blur(images, sigma_B1, 8)
    torch.testing.assert_close(compiled(images, sigma_B1, 8), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [28, 64])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_within_a_level_of_pils_on_average_at_the_edges_too(side, sigma):
    image = photograph(side)
    ours = augment.gaussian_blur(image[None].double() / 255, column([sigma]), 8)[0] * 255
    difference = (ours - from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(sigma)))).abs()
    border = torch.cat([difference[:, [0, -1]].flatten(), difference[:, :, [0, -1]].flatten()])
    assert difference.mean() < 1
    assert border.mean() < 1


def test_blur_of_no_width_and_in_a_picture_smaller_than_the_radius():
    images = random_images(5, 4)
    torch.testing.assert_close(augment.gaussian_blur(images, column([0.0] * 5), 8), images, rtol=0, atol=0)
    blurred = augment.gaussian_blur(torch.full((5, 3, 4, 4), 0.3), column([2.0] * 5, torch.float32), 8)
    torch.testing.assert_close(blurred, torch.full((5, 3, 4, 4), 0.3))


def in_torchvision(crop, draw, i):
    """Sample i of a view by torchvision's functions, one after the other, as `draw` says."""
    image = crop.double() / 255
    ops = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    values = [*draw.factor_B3[i].tolist(), draw.hue[i].item()]
    for op in draw.turn_B4[i].argsort().tolist():
        image = ops[op](image, values[op])
    if draw.on_grayscale[i]:
        image = F.rgb_to_grayscale(image, 3)
    if draw.on_blur[i]:
        padded = torch.nn.functional.pad(image[None], [8] * 4, mode="replicate")[0]
        image = F.gaussian_blur(padded, [17, 17], [draw.sigma[i].item()] * 2)[:, 8:-8, 8:-8]
    if draw.on_solarize[i]:
        image = F.solarize(image, 0.5)
    if draw.on_flip[i]:
        image = F.horizontal_flip(image)
    return F.normalize(image, list(MEAN), list(STD))


def test_the_whole_is_torchvisions_operations_in_the_drawn_order():
    crops, sample_B = random_crops(48, 10), torch.arange(48) * 5
    ours = FULL(crops, sample_B, 2).unflatten(0, (2, 48))
    for view in range(2):
        draw = FULL.draw(sample_B, 2, view)
        for i in range(48):
            expected = in_torchvision(crops[view, i], draw, i)
            torch.testing.assert_close(ours[view, i], expected, rtol=0, atol=1e-5)


def test_drawn_parameters_have_the_recipes_distribution():
    count = 24000
    for view, (blur, solarize) in enumerate([(1.0, 0.0), (0.1, 0.2)]):
        draw = FULL.draw(torch.arange(count), 0, view)
        jittered = (draw.factor_B3 != 1).any(1)
        assert torch.equal(jittered, draw.hue[:, 0] != 0)
        happened = [jittered, draw.on_grayscale, draw.on_blur, draw.on_solarize, draw.on_flip]
        for on, p in zip(happened, [0.8, 0.2, blur, solarize, 0.5], strict=True):
            assert abs(on.double().mean() - p) <= 6 * (p * (1 - p) / count) ** 0.5
        ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
        values = [*draw.factor_B3[jittered].T, draw.hue[jittered, 0], draw.sigma[:, 0]]
        for value, (low, high) in zip(values, ranges, strict=True):
            assert low <= value.min()
            assert value.max() <= high
            spread = (high - low) / 12**0.5
            assert abs(value.mean() - (low + high) / 2) < 6 * spread / len(value) ** 0.5
            assert value.std() == pytest.approx(spread, rel=0.03)
        _, orders = draw.turn_B4.argsort(1).unique(dim=0, return_counts=True)
        assert len(orders) == 24
        assert (orders - count / 24).abs().max() < 6 * (count / 24) ** 0.5


def test_events_of_a_sample_are_independent():
    often = augmenting(blur_probability=(0.5, 0.5), solarize_probability=(0.5, 0.5), grayscale_probability=0.5)
    draws = [often.draw(torch.arange(20000), epoch, view) for epoch in (0, 1) for view in (0, 1)]
    events = [
        [d.factor_B3[:, :1] != 1, d.on_grayscale, d.on_blur, d.on_solarize, d.on_flip, d.sigma, d.turn_B4]
        for d in draws
    ]
    columns = torch.cat([event.double() for of_draw in events for event in of_draw], 1)
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 6 / 20000**0.5


def test_settings_of_one_operation_leave_the_draws_of_others():
    sample_B = torch.arange(50)
    changed = augmenting(brightness=0.0, hue=0.0, grayscale_probability=0.9, solarize_probability=(0.5, 0.5))
    one, other = FULL.draw(sample_B, 1, 1), changed.draw(sample_B, 1, 1)
    assert torch.equal(one.factor_B3[:, 1:], other.factor_B3[:, 1:])
    for name in ("turn_B4", "sigma", "on_blur", "on_flip"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_two_views_and_two_epochs_differ():
    crops = random_crops(16, 8)
    crops[1] = crops[0]
    first, second = FULL(crops, torch.arange(16), 0), FULL(crops, torch.arange(16), 1)
    assert (first[:16] != first[16:]).flatten(1).any(1).all()
    assert (first != second).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "settings",
    [
        OFF,
        replace(OFF, jitter_probability=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0),
        replace(OFF, blur_probability=(1.0, 1.0), blur_sigma=(0.0, 0.0)),
    ],
)
def test_without_strength_images_are_only_normalised(settings):
    crops = random_crops(4, 8)
    expected = F.normalize(crops.double() / 255, list(MEAN), list(STD)).flatten(0, 1)
    torch.testing.assert_close(augmenting(settings)(crops, torch.arange(4), 0), expected, rtol=0, atol=1e-14)


def test_a_certain_flip_mirrors_every_image():
    crops = random_crops(4, 8)
    flipped = augmenting(OFF, flip_probability=1.0)(crops, torch.arange(4), 0)
    assert torch.equal(flipped, augmenting(OFF)(crops.flip(-1), torch.arange(4), 0))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_flip_alone_is_the_flip_of_the_whole_to_the_bit(probability, dtype):
    crops, sample_B = random_crops(40, 8), torch.arange(40)
    whole = augmenting(OFF, dtype, flip_probability=probability)(crops, sample_B, 3)
    alone = Flip(probability, MEAN, STD, 7, dtype)(crops[:1], sample_B, 3)
    assert torch.equal(alone, whole[:40])
    assert Flip(probability, MEAN, STD, 7)(crops[:1, :0], sample_B[:0], 3).shape == (0, 3, 8, 8)


def test_a_samples_images_do_not_depend_on_its_batch():
    crops, sample_B = random_crops(8, 14), torch.tensor([3, 1, 4, 15, 9, 2, 6, 53])
    whole = FULL(crops, sample_B, 5).unflatten(0, (2, 8))
    for rows in (slice(0, 2), slice(2, 8), [7, 0, 3]):
        part = FULL(crops[:, rows], sample_B[rows], 5).unflatten(0, (2, -1))
        torch.testing.assert_close(part, whole[:, rows], rtol=0, atol=1e-12)


unit = st.floats(0, 1)
pair = st.tuples(unit, unit)


@given(
    brightness=st.floats(0, 2),
    contrast=st.floats(0, 2),
    saturation=st.floats(0, 2),
    hue=st.floats(0, 0.5),
    jitter_probability=unit,
    grayscale_probability=unit,
    blur_sigma=st.tuples(st.floats(0, 3), st.floats(0, 3)).map(sorted),
    blur_probability=pair,
    solarize_probability=pair,
    flip_probability=unit,
    seed=st.integers(0, 2**64 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from(["noise", "black", "white", "primaries"]),
    side=st.integers(1, 12),
)
@settings(max_examples=60)
def test_any_settings_give_finite_images_of_the_normalised_range(kind, side, seed, dtype, **values):
    noise = random_crops(3, side)
    crops = {"noise": noise, "black": noise * 0, "white": noise * 0 + 255, "primaries": (noise > 127) * 255}[kind]
    section = replace(VALUES, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **values)
    images = Augment(section, seed, dtype)(crops.byte(), torch.arange(3), 0)
    assert images.shape == (6, 3, side, side)
    assert images.dtype == dtype
    assert images.isfinite().all()
    assert images.min() >= -1e-5
    assert images.max() <= 1 + 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_images_are_the_same_and_new_epochs_and_samples_compile_nothing(backend):
    recipe = augmenting(dtype=torch.float32)
    compiled = torch.compile(recipe, fullgraph=True, backend=backend)
    crops = random_crops(4, 8)
    for epoch in range(3):
        sample_B = torch.arange(4) + 1000 * epoch
        with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
            images = compiled(crops, sample_B, torch.tensor(epoch))
        torch.testing.assert_close(images, recipe(crops, sample_B, epoch), rtol=0, atol=1e-4)
