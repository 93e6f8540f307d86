"""What one core makes of JPEG files: decoding and two crops, against the published code's pipeline on Pillow images."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from engine.benchmarks.clock import alternate, median
from engine.data.decode import Crops, decode

WIDTH, HEIGHT = 500, 375  # as most of ImageNet
QUALITY = 90
IMAGES, ROUNDS = 32, 2
SIZE, CROP_MIN = 224, 0.08
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure_data() -> dict[str, Any]:
    """Images per second of CPU time on one core, two views of each. The engine leaves the rest of the augmentation to
    the device; the published pipeline does all of it here."""
    files, crops = make_files(IMAGES), Crops(SIZE, CROP_MIN)
    device, pipelines = torch.device("cpu"), [published_pipeline(view) for view in (0, 1)]
    with _one_thread():
        sides = alternate(partial(cut, files, crops), partial(transform, files, pipelines), ROUNDS, device)
    ours, theirs = (IMAGES / median(seconds).busy for seconds in sides)
    return {
        "images_per_second_per_core": ours,
        "reference_images_per_second_per_core": theirs,
        "ratio": ours / theirs,
    }


def make_files(count: int) -> list[bytes]:
    """JPEG files of smooth shapes with some noise, which take about as many bytes as photographs of this size."""
    random, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float64)
        pixels = (smooth + random.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        files.append(file.getvalue())
    return files


def cut(files: list[bytes], crops: Crops) -> np.ndarray:
    """The engine's part on the CPU: uint8 [N, 2, 3, S, S] of N files."""
    out = np.empty((len(files), crops.views, 3, crops.size, crops.size), np.uint8)
    draws = crops.draw(0, 0, torch.arange(len(files)))
    for sample, (file, draw) in enumerate(zip(files, draws, strict=True)):
        crops.cut(decode(file), draw, 0, sample, out[sample])
    return out


def transform(files: list[bytes], pipelines: list[transforms.Compose]) -> list[Tensor]:
    """The published part on the CPU: two normalised images of each file."""
    images = (Image.open(io.BytesIO(file)).convert("RGB") for file in files)
    return [pipeline(image) for image in images for pipeline in pipelines]


def published_pipeline(view: int) -> transforms.Compose:
    """The paper's augmentation of view 0 or 1 (appendix A), in torchvision's transforms and Pillow's blur."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(CROP_MIN, 1.0)),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([_blur], p=(1.0, 0.1)[view]),
            transforms.RandomSolarize(128, p=(0.0, 0.2)[view]),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(()).uniform_(0.1, 2.0))))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
