"""A share of the labels: some images of a source, as many of every class, drawn by a seed.

Shapes: N images of the source, M chosen ones, C classes.
"""

import hashlib

import numpy as np
import torch
from PIL import Image

from engine.data.philox import SUBSET, random_bits
from engine.data.source import Source
from engine.schema import wrong


class Subset(Source):
    """Images `chosen_M` of a source, in that order. Classes are those of the source, with images here or not."""

    def __init__(self, source: Source, chosen_M: np.ndarray):
        self._source, self._chosen_M = source, chosen_M
        self.labels = None if source.labels is None else source.labels[chosen_M]
        self.classes = source.classes
        chosen = chosen_M.astype("<i8").tobytes()
        self.fingerprint = hashlib.sha256(f"subset of {source.fingerprint} ".encode() + chosen).hexdigest()

    def __len__(self) -> int:
        return len(self._chosen_M)

    def read(self, i: int) -> Image.Image:
        return self._source.read(int(self._chosen_M[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._chosen_M[i]))


def take_labels(source: Source, share: float, seed: int, key: str) -> Source:
    """As many images of every class as a `share`, in (0, 1], of the average class has; all of them for a share of 1.

    That is share x N / C, rounded, and at least one; of a class that has fewer, all. Every image draws a random number
    by (seed, image), and those with a class's smallest are taken: so a smaller share lies within a larger one.
    Raises UserError, which calls the share `key`, where a share below 1 is asked of images without labels.
    """
    if share == 1:
        return source
    if source.labels is None:
        do = "sort the images into a folder for each class, or take all"
        raise wrong(key, f"{share * 100:g}%", "100% where images have no labels", do)
    per_class = max(1, round(share * len(source) / len(source.classes)))
    order_N = np.lexsort((_draw(seed, len(source)), source.labels))  # class by class, each from its smallest draw on
    count_C = np.bincount(source.labels, minlength=len(source.classes))
    place_N = np.arange(len(source)) - np.repeat(np.cumsum(count_C) - count_C, count_C)  # of order_N's images in theirs
    return Subset(source, np.sort(order_N[place_N < per_class]))


def _draw(seed: int, images: int) -> np.ndarray:
    """A random 64-bit number for every image: uint64 [N]."""
    words_N2 = random_bits(seed, 0, torch.arange(images), 0, SUBSET)[:, :2].numpy().astype(np.uint64)
    return words_N2[:, 0] << np.uint64(32) | words_N2[:, 1]
