"""The augmentation after the crop, on the device, for a whole batch at once (paper appendix A, "Data augmentation").

Every parameter is drawn per sample from (seed, epoch, sample, view), so a sample looks the same in any batch on any
rank. The operations are those of torchvision on float images in [0, 1]. The published recipe works on 8-bit images and
rounds after each operation; here nothing is rounded.

Shapes: V views, B local batch, S side of the crop; K = 2 * radius + 1 taps of the blur,
n windows, each of W pixels, of which N are blurred.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.data.philox import AUGMENT, uniform
from engine.recipe import sections

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2  # the blends of the colour jitter, as indices
Planes = Sequence[Tensor]  # red, green and blue, each [B, 1, S, S]
_LUMA = (0.2989, 0.587, 0.114)
_WHOLE, _STEP = 128, 32  # of the blur, in pixels: the largest image that is one window; from window to window in others


class Draw(NamedTuple):
    """What happens to each sample of one view. All [B, 1] but for the shapes named; `on_` is whether it happens."""

    turn_B4: Tensor  # brightness, contrast, saturation, hue go in ascending order of this
    factor_B3: Tensor  # of brightness, contrast, saturation; 1 where there is no jitter
    hue: Tensor  # shift, in turns of the colour circle; 0 where there is no jitter
    sigma: Tensor  # of the blur, in pixels
    on_grayscale: Tensor
    on_blur: Tensor
    on_solarize: Tensor
    on_flip: Tensor


@dataclass(frozen=True)
class Augment:
    """Crops in, normalised images out: a pure function, without state or tensors of its own.

    The section says what happens: spreads of a factor around 1 (brightness, contrast, saturation) and of a shift around
    0 (hue), as in torchvision's ColorJitter; blur and solarize have a probability per view. Arithmetic and result are
    in `dtype`. What the values rule out costs nothing.
    """

    section: sections.Augment
    seed: int
    dtype: torch.dtype = torch.float32

    def __call__(self, crops_VBCSS: Tensor, sample_B: Tensor, epoch: int | Tensor) -> Tensor:
        """uint8 crops [V, B, 3, S, S] to images [V*B, 3, S, S] in `dtype`: view 1's batch, then view 2's.

        In compiled code pass the epoch as a 0-d int64 tensor, so that the next epoch compiles nothing.
        """
        draws = [self.draw(sample_B, epoch, view) for view in range(len(crops_VBCSS))]
        every = Draw(*(torch.cat(values) for values in zip(*draws, strict=True)))
        return self._apply(crops_VBCSS.flatten(0, 1), every)

    def draw(self, sample_B: Tensor, epoch: int | Tensor, view: int) -> Draw:
        """The parameters of each sample in one view (0 or 1). What a sample draws for one operation does not depend
        on the settings of the others."""
        turn_B4, strength_B4, sigma, jitter, grayscale, blur, solarize, flip = _numbers(
            self.seed, epoch, sample_B, view
        )
        values = self.section
        spreads = (values.brightness, values.contrast, values.saturation)
        factors = [_between(max(0, 1 - s), 1 + s, strength_B4[:, i]) for i, s in enumerate(spreads)]
        hue = _between(-values.hue, values.hue, strength_B4[:, 3:])
        on_jitter = jitter < values.jitter_probability
        return Draw(
            turn_B4=turn_B4,
            factor_B3=torch.where(on_jitter, torch.stack(factors, 1), 1).to(self.dtype),
            hue=torch.where(on_jitter, hue, 0).to(self.dtype),
            sigma=_between(*values.blur_sigma, sigma).to(self.dtype),
            on_grayscale=grayscale < values.grayscale_probability,
            on_blur=blur < values.blur_probability[view],
            on_solarize=solarize < values.solarize_probability[view],
            on_flip=flip < values.flip_probability,
        )

    def _apply(self, crops_BCSS: Tensor, draw: Draw) -> Tensor:
        values = self.section
        # Colours lie in planes of their own: a compiler makes one kernel of sums over an image and what is done to its
        # pixels, where both run over the same pixels.
        planes = (crops_BCSS.to(self.dtype) / 255).split(1, 1)
        if values.jitter_probability > 0:
            planes = self._jitter(planes, draw)
        if values.grayscale_probability > 0:
            grey_B1SS, on_B111 = grayscale(planes), _image(draw.on_grayscale.to(self.dtype))
            planes = [plane_B1SS.lerp(grey_B1SS, on_B111) for plane_B1SS in planes]
        x = torch.cat(list(planes), 1)
        if any(values.blur_probability):
            # Four standard deviations hold all but 6e-5 of a Gaussian. A sigma of 0 changes nothing, to the bit.
            x = gaussian_blur(x, draw.sigma * draw.on_blur, radius=math.ceil(4 * values.blur_sigma[1]))
        if any(values.solarize_probability):
            x = solarize(x, draw.on_solarize.to(self.dtype))
        if values.flip_probability > 0:
            x = torch.where(_image(draw.on_flip), x.flip(-1), x)
        return normalise(x.contiguous(), values.mean, values.std)

    def _jitter(self, planes: Planes, draw: Draw) -> Planes:
        """Brightness, contrast, saturation and hue, in each sample's own order.

        A sample's next blend costs one pass whichever it is, but hue is dear. So hue is computed once, between two
        rounds of the blends: the first does what precedes hue in the sample's order, the second the rest, and a
        factor of 1 changes nothing, to the bit.
        """
        turn_B3, op_B3 = draw.turn_B4[:, :3].sort(1)
        factor_B3 = draw.factor_B3.gather(1, op_B3)
        if self.section.hue > 0:
            before_B3 = turn_B3 < draw.turn_B4[:, 3:]
            planes = self._blends(planes, op_B3, torch.where(before_B3, factor_B3, 1))
            planes = adjust_hue(planes, draw.hue)
            factor_B3 = torch.where(before_B3, 1, factor_B3)
        return self._blends(planes, op_B3, factor_B3)

    def _blends(self, planes: Planes, op_B3: Tensor, factor_B3: Tensor) -> Planes:
        if self.section.brightness == self.section.contrast == self.section.saturation == 0:
            return planes
        for op_B1, factor_B1 in zip(op_B3.split(1, 1), factor_B3.split(1, 1), strict=True):
            planes = blend(planes, op_B1, factor_B1)
        return planes


@dataclass(frozen=True)
class Flip:
    """Crops in, normalised images out, mirrored with a `probability`: what supervised training does to a crop.

    Arithmetic and result are in `dtype`. Whether a sample is flipped, Augment would draw alike.
    """

    probability: float
    mean: Sequence[float]
    std: Sequence[float]
    seed: int
    dtype: torch.dtype = torch.float32

    def __call__(self, crops_1BCSS: Tensor, sample_B: Tensor, epoch: int | Tensor) -> Tensor:
        """uint8 crops [1, B, 3, S, S], one view, to images [B, 3, S, S] in `dtype`."""
        x = crops_1BCSS[0].to(self.dtype) / 255
        *_, flip = _numbers(self.seed, epoch, sample_B, 0)
        return normalise(torch.where(_image(flip < self.probability), x.flip(-1), x), self.mean, self.std)


def normalise(x_BCSS: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel."""
    return (x_BCSS - _channels(mean, x_BCSS)) / _channels(std, x_BCSS)


def denormalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo `normalise` for images [..., 3, S, S]: values from 0 to 1, to look at."""
    return (x * _channels(std, x) + _channels(mean, x)).clamp(0, 1)


def blend(planes: Planes, op_B1: Tensor, factor_B1: Tensor) -> Planes:
    """Each image's own choice of BRIGHTNESS, CONTRAST or SATURATION, by its own factor: factor * x + (1 - factor) *
    target, clamped to [0, 1]; the target is black, the image's mean grey, or its grey at each pixel."""
    grey_B1SS = grayscale(planes)
    rest_B1 = 1 - factor_B1
    of_mean = _image(rest_B1 * (op_B1 == CONTRAST)) * grey_B1SS.mean((2, 3), keepdim=True)
    target_B1SS = _image(rest_B1 * (op_B1 == SATURATION)) * grey_B1SS + of_mean
    return [torch.addcmul(target_B1SS, _image(factor_B1), plane_B1SS).clamp(0, 1) for plane_B1SS in planes]


def grayscale(planes: Planes) -> Tensor:
    """Luma, [B, 1, S, S]."""
    red, green, blue = planes
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def adjust_hue(planes: Planes, shift_B1: Tensor) -> Planes:
    """Turn each image's hues by its shift, in turns of the colour circle; HSV's value and saturation stay."""
    red, green, blue = planes
    top = torch.maximum(torch.maximum(red, green), blue)
    chroma = top - torch.minimum(torch.minimum(red, green), blue)
    # Masks as 0 and 1: on a CPU products are many times faster than `where`.
    is_red = (red == top).to(red.dtype)
    is_green = (green == top).to(red.dtype) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    # Hue in sixths of the circle from red. Where there is no chroma the numerator is 0 and hue does not matter.
    numerator = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = numerator / chroma.clamp_min(1e-12) + 2 * is_green + 4 * is_blue + _image(6 * shift_B1)
    hue = hue - 6 * (hue / 6).floor()
    # How much of the chroma each channel lacks at this hue: 0 at its own third of the circle, 1 at the opposite one.
    lacks = (2 - (hue - 3).abs(), (hue - 2).abs() - 1, (hue - 4).abs() - 1)
    return [top - chroma * lack.clamp(0, 1) for lack in lacks]


def gaussian_blur(x_BCSS: Tensor, sigma_B1: Tensor, radius: int) -> Tensor:
    """Blur each square image by a Gaussian of its own sigma, sampled at whole pixels up to `radius`; beyond an edge
    the edge pixel repeats, as in PIL.

    First along rows, then along columns, windows of W pixels are multiplied by one [W, N] matrix per image, which gives
    N pixels each: few operations, and of one shape whatever sigma is. A small image is one window without a margin, and
    its matrix repeats the edges.
    """
    (B, _, S, _), device = x_BCSS.shape, x_BCSS.device
    N, margin = (S, 0) if S <= _WHOLE else (_STEP, radius)
    W = N + 2 * margin
    tap_K = torch.arange(-radius, radius + 1, device=device)
    weight_BK = torch.exp(-0.5 * (tap_K / sigma_B1.clamp_min(1e-3)) ** 2)
    weight_BK = weight_BK * (weight_BK > 1e-12)  # denormal numbers make a CPU's product several times slower
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    source_K1N = (tap_K[:, None, None] + torch.arange(margin, margin + N, device=device)).clamp(0, W - 1)
    is_source_KWN = source_K1N == torch.arange(W, device=device)[:, None]
    matrix_BWN = (weight_BK @ is_source_KWN.to(x_BCSS.dtype).flatten(1)).view(B, W, N)
    if N < S:  # not by F.pad, which breaks a graph on a GPU under deterministic algorithms
        x_BCSS = torch.ops.aten.replication_pad2d(x_BCSS, [margin, margin + -S % N] * 2)
    x_BCSS = (x_BCSS.unfold(3, W, N).flatten(1, 3) @ matrix_BWN).view(*x_BCSS.shape[:3], S + -S % N)
    window_BWCnS = x_BCSS.unfold(2, W, N).movedim(-1, 1)
    x_BNCnS = (matrix_BWN.mT @ window_BWCnS.flatten(2)).view(B, N, *window_BWCnS.shape[2:])
    return x_BNCnS.permute(0, 2, 3, 1, 4).flatten(2, 3)[..., :S, :S]


def solarize(x_BCSS: Tensor, on_B1: Tensor) -> Tensor:
    """Where `on` is 1 and not 0, invert what is at or above level 128 of 255. Between 127 and 128 the limit is their
    middle, where an inversion changes nothing: so rounding noise never turns into a jump."""
    return torch.minimum(x_BCSS, (_image(on_B1) - x_BCSS).abs())


def _numbers(seed: int, epoch: int | Tensor, sample_B: Tensor, view: int) -> tuple[Tensor, ...]:
    """What a sample draws in a view, in [0, 1): the jitter's turns [B, 4] and strengths [B, 4], the blur's sigma, and
    for jitter, grayscale, blur, solarize and flip whether they happen, each [B, 1]."""
    return uniform(seed, epoch, sample_B, view, AUGMENT, 14).split((4, 4, 1, 1, 1, 1, 1, 1), 1)


def _between(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    """[3, 1, 1]: one value per channel, made on the device, for which nothing waits."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


def _image(value_B1: Tensor) -> Tensor:
    """[B, 1] to [B, 1, 1, 1]: one value per image."""
    return value_B1[:, :, None, None]
