"""What fine-tuning does to images beside crop and flip: timm's RandAugment, random erasing, Mixup and CutMix.

timm draws from the global generators of Python, NumPy and PyTorch. Here each call starts them from (seed, epoch,
sample) or (seed, step) and puts them back, so a sample looks the same in any batch, on any rank, in any worker.

Shapes: B images of this rank, S side of an image, C classes.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from engine.data.decode import RESAMPLING
from engine.data.philox import ERASE_HOW, ERASE_WHETHER, MIX, RANDAUGMENT, random_bits, uniform
from engine.recipe.sections import Interpolation


@contextmanager
def generators_at(seed: int, epoch: int, sample: int, stream: int, device: str = "cpu") -> Iterator[None]:
    """The global generators of Python, NumPy and PyTorch (CPU) start from these numbers inside, and go on afterwards.

    So does that of the GPU, if the `device` is cuda, but it is not put back: nothing else here draws from it.
    """
    words = random_bits(seed, epoch, torch.tensor([sample]), 0, stream)[0].tolist()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(words[0] << 32 | words[1])
        np.random.seed(words)
        number = words[2] << 31 | words[3] >> 1
        torch.default_generator.manual_seed(number)  # torch.manual_seed formats its stack for each kind of device
        if device == "cuda":
            torch.cuda.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment of a crop, in the loader's worker.

    config: in timm's words, such as `rand-m9-mstd0.5-inc1`. fill: the colour, from 0 to 1, of what a turn uncovers.
    """

    config: str
    seed: int
    size: int
    fill: tuple[float, ...]
    interpolation: Interpolation

    def __call__(self, crop: Image.Image, epoch: int, sample: int) -> Image.Image:
        with generators_at(self.seed, epoch, sample, RANDAUGMENT):
            return self._transform(crop)

    @cached_property
    def _transform(self):
        # timm's own values: shifts of up to 45 % of the side, and the mean colour.
        fill = tuple(min(255, round(255 * value)) for value in self.fill)
        hints = {"translate_const": int(0.45 * self.size), "img_mean": fill}
        transform = rand_augment_transform(self.config, hints | {"interpolation": RESAMPLING[self.interpolation]})
        for op in transform.ops:
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_keep_a_bit, op.level_fn)
        return transform


def _keep_a_bit(level_fn: Callable, level: float, hints: dict) -> tuple[int]:
    # At its strongest timm asks for 0 bits of each colour, a black image; newer Pillow refuses that.
    return (max(1, level_fn(level, hints)[0]),)


def erase(images_BCSS: Tensor, sample_B: Tensor, epoch: int, probability: float, seed: int) -> None:
    """timm's random erasing, in place: a rectangle of normal noise in some of the normalised images.

    sample_B is on the CPU: which images are chosen is known without asking the device.
    """
    eraser = RandomErasing(1.0, mode="pixel", device=str(images_BCSS.device))
    chosen_B = uniform(seed, epoch, sample_B, 0, ERASE_WHETHER, 1)[:, 0] < probability
    for b in chosen_B.nonzero().flatten().tolist():
        with generators_at(seed, epoch, int(sample_B[b]), ERASE_HOW, images_BCSS.device.type):
            eraser(images_BCSS[b])


@dataclass(frozen=True)
class Mix:
    """timm's Mixup and CutMix: a batch is mixed with its mirror, row i with row G-1-i of the global batch.

    mixup, cutmix: the alpha of each one's Beta distribution, 0 for none; with both, each batch takes one of them.
    """

    mixup: float
    cutmix: float
    label_smoothing: float
    classes: int
    seed: int

    @property
    def is_on(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(
        self, images_BCSS: Tensor, label_B: Tensor, other_BCSS: Tensor, other_label_B: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Mixed images and targets [B, C], given those of the rank at the other end, as that rank has them.

        Every rank mixes by the same share and cuts the same rectangle in the same step.
        """
        mixup = Mixup(
            self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.classes, mode="batch"
        )
        # timm mixes a batch with its own mirror: in a batch of both each row meets its partner.
        images, labels = torch.cat([images_BCSS, other_BCSS]), torch.cat([label_B, other_label_B])
        with generators_at(self.seed, 0, step, MIX):
            mixed, target = mixup(images, labels)
        return mixed[: len(label_B)].clone(), target[: len(label_B)]  # the other half need not live on

    def plain_target(self, label_B: Tensor) -> Tensor:
        """Smoothed targets [B, C] of images that are not mixed."""
        return mixup_target(label_B, self.classes, 1.0, self.label_smoothing)
