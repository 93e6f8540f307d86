"""What one core makes of JPEG files: decoding and two crops, against the published code's pipeline on Pillow images."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from engine.benchmarks.clock import alternate, median
from engine.data.decode import Crops, decode
from engine.errors import UserError

QUALITY = 90  # files of 500 x 375 then take 55 KB on average
ROUNDS = 6
SIZE, CROP_MIN = 224, 0.08
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Files(NamedTuple):
    """So many files of one size in pixels."""

    count: int
    width: int
    height: int


FILES = {"": Files(32, 500, 375), "large_": Files(6, 2000, 1500)}  # as most of ImageNet; as cameras make them


def measure_data() -> dict[str, Any]:
    """Images per second of CPU time on one core, two views of each. The engine leaves the rest of the augmentation to
    the device; the published pipeline does all of it here. Raises UserError where the photographs are missing."""
    return {key: value for kind, files in FILES.items() for key, value in _measured(kind, make_files(files)).items()}


def _measured(kind: str, files: list[bytes]) -> dict[str, float]:
    crops, pipelines = Crops(SIZE, CROP_MIN), [published_pipeline(view) for view in (0, 1)]
    with _one_thread():
        memory = np.empty((crops.views, SIZE, SIZE, 3), np.uint8).transpose(0, 3, 1, 2)  # as loading processes have it
        sides = partial(cut, files, crops, memory), partial(transform, files, pipelines)
        ours, theirs = (len(files) / median(side).busy for side in alternate(*sides, ROUNDS, torch.device("cpu")))
    return {
        f"{kind}images_per_second_per_core": ours,
        f"{kind}reference_images_per_second_per_core": theirs,
        f"{kind}ratio": ours / theirs,
    }


def make_files(files: Files) -> list[bytes]:
    """JPEG files of parts of photographs, and of those repeated in mirrors where more pixels are wanted."""
    random, made = np.random.default_rng(0), []
    for whole_HW3 in islice(cycle(_photographs()), files.count):
        missing = [max(0, files.height - whole_HW3.shape[0]), max(0, files.width - whole_HW3.shape[1])]
        whole_HW3 = np.pad(whole_HW3, [*((0, more) for more in missing), (0, 0)], mode="symmetric")
        top = random.integers(whole_HW3.shape[0] - files.height + 1)
        left = random.integers(whole_HW3.shape[1] - files.width + 1)
        part_HW3, file = whole_HW3[top : top + files.height, left : left + files.width], io.BytesIO()
        Image.fromarray(part_HW3).save(file, "JPEG", quality=QUALITY)
        made.append(file.getvalue())
    return made


def _photographs() -> list[np.ndarray]:
    """Two of 640 x 427 pixels, which scikit-learn carries: uint8 [H, W, 3]."""
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        do = "`pip install -e '.[pictures]'` or `pip install scikit-learn`"
        raise UserError(f"bench data needs the photographs of scikit-learn, which is not installed; do {do}") from error
    return load_sample_images().images


def cut(files: list[bytes], crops: Crops, out_V3SS: np.ndarray) -> None:
    """The engine's part on the CPU: writes two crops of each file to the same memory, as a loading process does."""
    for sample, (file, draw) in enumerate(zip(files, crops.draw(0, 0, torch.arange(len(files))), strict=True)):
        crops.cut(decode(file), draw, 0, sample, out_V3SS)


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
