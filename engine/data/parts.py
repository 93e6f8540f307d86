"""Batches by torchdata's nodes: cut into parts, which several processes read at once, and put together in order.

Shapes: V views, B images of a batch, S side of an image in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchdata.nodes import BaseNode, ParallelMapper, Prefetcher

from engine.data.source import Source
from engine.data.workers import ROOM, Work, Workers
from engine.errors import UserError

T = TypeVar("T")
MOST = 32  # images of a part: less than that is said and sent for each image than it takes to read one


@dataclass
class Draft:
    """A batch whose parts are being read.

    about: which batch it is. image_B: the images' numbers (of training: samples). pixels: uint8 [V, B, 3, S, S].
    replies: of its parts' work, in order.
    """

    about: Any
    image_B: np.ndarray
    pixels: Tensor
    replies: list[Any] = field(default_factory=list)


class Batches(Protocol):
    """Which batches there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int) -> tuple[Any, np.ndarray]:
        """(about, image_B) of a `Draft`."""


@dataclass
class _Part:
    draft: Draft
    rows: slice
    is_last: bool
    reply: Any = None


class _Parts(BaseNode[_Part]):
    """The parts of all batches in order. Its state is how many batches have been handed out whole."""

    def __init__(self, batches: Batches, shape: tuple[int, int], most: int, pin_memory: bool):
        super().__init__()
        self.batches, self.shape, self.most, self.pin_memory = batches, shape, most, pin_memory

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.batch = initial_state["batch"] if initial_state else 0
        self.rest: Iterator[_Part] = iter(())

    def next(self) -> _Part:
        part = next(self.rest, None)
        if part is None:
            if self.batch == len(self.batches):
                raise StopIteration
            self.rest = self._parts(*self.batches[self.batch])
            part = next(self.rest)
        self.batch += part.is_last
        return part

    def get_state(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def _parts(self, about: Any, image_B: np.ndarray) -> Iterator[_Part]:
        (views, size), images = self.shape, len(image_B)
        pixels = torch.empty(views, images, 3, size, size, dtype=torch.uint8, pin_memory=self.pin_memory)
        draft = Draft(about, image_B, pixels)
        for first in range(0, max(1, images), self.most):
            yield _Part(draft, slice(first, first + self.most), first + self.most >= images)


class _Joined(BaseNode[T | Exception]):
    """The batches, each made of its parts by `finish`, or the first error among these."""

    def __init__(self, parts: BaseNode[_Part], finish: Callable[[Draft], T]):
        super().__init__()
        self.parts, self.finish = parts, finish

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.parts.reset(initial_state)

    def next(self) -> T | Exception:
        while True:
            part = next(self.parts)
            if isinstance(part.reply, Exception):
                return part.reply
            part.draft.replies.append(part.reply)
            if part.is_last:
                return self.finish(part.draft)

    def get_state(self) -> dict[str, Any]:
        return self.parts.state_dict()


def joined(
    source: Source, work: Work, batches: Batches, shape: tuple[int, int], finish: Callable[[Draft], T], workers: Workers
) -> BaseNode[T | Exception]:
    """The batches as a node of torchdata, whose state is the number of batches that it has given.

    work: given the source, (a draft's `about`, numbers of images) and their pixels [V, images, 3, S, S]; `finish` gets
    its replies. shape: (V, S). At most two parts for each process and two whole batches are under way.
    """
    views, size = shape
    least = views * 3 * size**2
    if least > ROOM:
        raise UserError(f"model.image_size ({size}) must be at most {int((ROOM / views / 3) ** 0.5)}; lower it")

    def read(part: _Part) -> _Part:
        draft, rows = part.draft, part.rows
        try:
            argument = draft.about, draft.image_B[rows]
            part.reply = workers.read(source, work, argument, draft.pixels[:, rows].numpy())
        except Exception as error:  # raised in a thread of torchdata's, it would come wrapped in text
            part.reply = error
        return part

    most = min(MOST, ROOM // least, -(-_largest(batches) // max(1, workers.count)))
    parts = _Parts(batches, shape, max(1, most), workers.pin_memory)
    # Threads, which wait for a process each: torchdata's own processes, where one dies, are waited for for ever.
    found = _Joined(ParallelMapper(parts, read, num_workers=workers.count), finish)
    return Prefetcher(found, prefetch_factor=1) if workers.count else found


def _largest(batches: Batches) -> int:
    """B of the first batch, which no other exceeds."""
    return len(batches[0][1]) if len(batches) else 0


def delivered(node: BaseNode[T | Exception]) -> Iterator[T]:
    """What a node of `joined` gives; an error among that is raised."""
    try:
        for item in node:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        del node  # else a traceback that refers to this frame would keep its threads
