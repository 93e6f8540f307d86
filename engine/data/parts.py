"""Batches in parts, which several processes read at once, as a node of torchdata.

Shapes: V views, B images of a batch, P of a part of it, S side of an image in pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchdata.nodes import BaseNode, Prefetcher

from engine.data.source import Source
from engine.data.workers import ROOM, Work, Workers
from engine.errors import UserError

T = TypeVar("T")
MOST = 32  # images of a part: to ask for so many and to answer costs less than to read one of them


class Draft(NamedTuple):
    """A batch that is being read.

    about: which one it is. image_B: the images' numbers (of training: samples). pixels: uint8 [V, B, 3, S, S], the
    three of a pixel side by side in memory, as decoders have them: a GPU sorts them in no time, a CPU core does not.
    """

    about: Any
    image_B: np.ndarray
    pixels: Tensor


class Batches(Protocol):
    """Which batches there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[Any, np.ndarray]:
        """(about, image_B) of a `Draft`."""


class _Read(BaseNode[T | Exception]):
    """The batches, each made by `finish` of its draft and its parts' replies. An error is given, and ends them: raised
    in a thread of torchdata's, it would come wrapped in text. The state is the number of batches given."""

    def __init__(
        self,
        read: Callable[[Any, np.ndarray], Any],
        batches: Batches,
        shape: tuple[int, int],
        finish: Callable[[Draft, list[Any]], T],
        workers: Workers,
    ):
        super().__init__()
        self.read, self.batches, self.shape, self.finish, self.workers = read, batches, shape, finish, workers
        # A thread for each process, which waits for it.
        self.threads = ThreadPoolExecutor(workers.count) if workers.count else None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.given, self.failed = initial_state["batches"] if initial_state else 0, False
        self.asked: deque[tuple[Draft, bool, Callable[[], Any]]] = deque()
        self.parts = self._parts(self.given)

    def next(self) -> T | Exception:
        if self.failed or self.given == len(self.batches):
            raise StopIteration
        try:
            batch = self._next()
        except Exception as error:
            self.failed = True
            return error
        self.given += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"batches": self.given}

    def _next(self) -> T:
        replies, is_last = [], False
        while not is_last:
            while len(self.asked) < max(1, 2 * self.workers.count) and (part := next(self.parts, None)):
                self.asked.append(part)
            draft, is_last, reply = self.asked.popleft()
            replies.append(reply())
        return self.finish(draft, replies)

    def _parts(self, first: int) -> Iterator[tuple[Draft, bool, Callable[[], Any]]]:
        """Of each batch from the first on: the draft, whether the part is its last, and what waits for the reply."""
        for number in range(first, len(self.batches)):
            draft = self._draft(*self.batches[number])
            images = len(draft.image_B)
            most = min(MOST, ROOM // self._bytes(), -(-images // max(1, self.workers.count))) or 1
            for start in range(0, max(1, images), most):
                rows = slice(start, start + most)
                argument, pixels = (draft.about, draft.image_B[rows]), draft.pixels[:, rows].numpy()
                yield draft, rows.stop >= images, self._ask(argument, pixels)

    def _ask(self, argument: tuple[Any, np.ndarray], pixels: np.ndarray) -> Callable[[], Any]:
        if self.threads is None:
            return partial(self.read, argument, pixels)
        future: Future[Any] = self.threads.submit(self.read, argument, pixels)
        return future.result

    def _draft(self, about: Any, image_B: np.ndarray) -> Draft:
        (views, size), pins = self.shape, self.workers.device.type == "cuda"
        # A thread of its own has no device yet, and would take memory of the first.
        with torch.cuda.device(self.workers.device) if pins else nullcontext():
            pixels = torch.empty(views, len(image_B), size, size, 3, dtype=torch.uint8, pin_memory=pins)
        return Draft(about, image_B, pixels.permute(0, 1, 4, 2, 3))

    def _bytes(self) -> int:
        """Of one image."""
        views, size = self.shape
        if (found := views * 3 * size**2) > ROOM:
            raise UserError(f"model.image_size ({size}) must be at most {int((ROOM / views / 3) ** 0.5)}; lower it")
        return found


def in_parts(
    source: Source,
    work: Work,
    batches: Batches,
    shape: tuple[int, int],
    finish: Callable[[Draft, list[Any]], T],
    workers: Workers,
) -> Iterator[T]:
    """The batches in order. At most two parts for each process, and one whole batch, are under way.

    work: given the source, (a draft's `about`, numbers of images) and their pixels [V, P, 3, S, S]; `finish` gets its
    replies. shape: (V, S). Raises what these raise and what `Workers.read` does.
    """
    read = _Read(partial(workers.read, source, work), batches, shape, finish, workers)
    node = Prefetcher(read, prefetch_factor=1) if workers.count else read
    try:
        for item in node:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        if read.threads is not None:
            read.threads.shutdown(wait=False, cancel_futures=True)
        del node  # else a traceback that refers to this frame would keep its thread
