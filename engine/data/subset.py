"""Some images of a source with labels, as many of every class, drawn by a seed.

Shapes: N images of the source, M chosen ones, C classes.
"""

import hashlib

import numpy as np

from engine.data.philox import SUBSET, random_64
from engine.data.source import Choice, Source


class Subset(Choice):
    """Images `chosen_M` of a source with labels, in that order. Classes stay the source's, also empty ones."""

    def __init__(self, source: Source, chosen_M: np.ndarray):
        super().__init__(source)
        self._chosen_M, self.labels = chosen_M, source.labels[chosen_M]
        chosen = chosen_M.astype("<i8").tobytes()
        self.fingerprint = hashlib.sha256(f"subset of {source.fingerprint} ".encode() + chosen).hexdigest()

    def __len__(self) -> int:
        return len(self._chosen_M)

    def _number(self, i: int) -> int:
        return int(self._chosen_M[i])


def take_labels(source: Source, share: float, seed: int) -> Source:
    """As many images of every class as a `share`, in (0, 1], of the average class has; all of them for a share of 1.

    That is share x N / C, rounded, and at least one.
    """
    if share == 1:
        return source
    return take_per_class(source, max(1, round(share * len(source) / len(source.classes))), seed)


def take_per_class(source: Source, per_class: int, seed: int) -> Source:
    """This many images of every class; of a class that has fewer, all.

    Every image draws a random number by (seed, image), and those with a class's smallest are taken: so fewer images
    lie within more. The source has labels.
    """
    draw_N = random_64(seed, 0, len(source), SUBSET)
    order_N = np.lexsort((draw_N, source.labels))  # class by class, each from its smallest draw on
    count_C = np.bincount(source.labels, minlength=len(source.classes))
    place_N = np.arange(len(source)) - np.repeat(np.cumsum(count_C) - count_C, count_C)  # 0, 1, ... within each class
    return Subset(source, np.sort(order_N[place_N < per_class]))
