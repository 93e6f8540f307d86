"""Images that could not be read, and how they are reported."""

import math
from collections.abc import Hashable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.logger import warn


class Bad(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


def report(bad: Sequence[Bad], consequence: str, of: Hashable) -> None:
    """Each unreadable image, from the rank that met it; once, as each rank meets the same ones in every evaluation.

    of: what tells the images' set from others, which may have images of the same names.
    """
    for image in bad:
        _report_once(image, consequence, of)


@cache
def _report_once(image: Bad, consequence: str, of: Hashable) -> None:
    _report(image, consequence)


def _report(image: Bad, consequence: str) -> None:
    warn(f"{image.name} could not be read ({image.reason}); {consequence}")


class BadImages:
    """Those of a run: counted over all ranks, reported once each, and borne up to a share.

    bearable: the share of all images seen that may be unreadable (data.max_bad_fraction).

    total: on all ranks since the run began, as of the last `count`.
    """

    def __init__(self, bearable: float, world: World):
        self.bearable, self.world = bearable, world
        self.total = 0
        self.met = 0  # on this rank since the last count
        self._said: set[Bad] = set()  # by this rank, and by the others up to the last count
        self._new: list[Bad] = []  # said by this rank since then

    def meet(self, bad: Sequence[Bad]) -> None:
        """Count unreadable images and report those that no rank has, as of the last count."""
        self.met += len(bad)
        for image in bad:
            if image not in self._said:
                self._said.add(image)
                self._new.append(image)
                _report(image, "its neighbour took its place")

    def count(self) -> int:
        """Add what the ranks met since the last time; all ranks call it together. Returns `total`."""
        counts = torch.tensor([self.met, len(self._new)])
        dist.all_reduce(counts, group=self.world.host_group)
        met, new = counts.tolist()
        if new:  # each epoch shows an image to another rank
            self._said.update(*all_gather(self._new, self.world.host_group))
        self.total, self.met, self._new = self.total + met, 0, []
        return self.total

    def excess(self, total: int, images: int) -> str | None:
        """Why a run cannot go on that has met so many, in words; None where it bears them.

        images: those of all epochs begun so far. Against those seen, one bad image of the first batch is a large share.
        """
        if bears(self.bearable, total, images):
            return None
        return (
            f"data.max_bad_fraction ({self.bearable}) was exceeded: {total} of {images} images could not be read; "
            f"repair them, and pass data.max_bad_fraction={least_fraction(total, images):g} or more to go on"
        )


def bears(fraction: float, bad: int, images: int) -> bool:
    """Whether data.max_bad_fraction bears so many of some images: as a quotient, since 0.29 * 100 is less than 29."""
    return not bad or bad / images <= fraction


def least_fraction(bad: int, images: int) -> float:
    """The least data.max_bad_fraction, in thousandths, that bears so many of some images."""
    return math.ceil(1000 * bad / images) / 1000
