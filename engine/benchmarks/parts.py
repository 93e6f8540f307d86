"""How a step's time divides: the functions that `train_step` calls, timed from outside for as long as one looks."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from engine.benchmarks.clock import finish
from engine.training import step
from engine.training.micro_batch import MicroPasses, WholePasses
from engine.training.step import TrainState

WHOLE, AUGMENTATION, OTHER = "step", "augmentation", "other"


class Span(NamedTuple):
    """A call: of which part, inside of which other, and the marks of its beginning and end."""

    part: str
    within: str | None
    start: Any
    end: Any


class Parts:
    """Milliseconds of each part of each step: between events on a GPU, CPU time on a CPU. A part inside another counts
    for itself alone. In a profile the parts are ranges of these names."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.device = device.type == "cuda", device
        self.under_way: list[str] = []
        self.spans: list[Span] = []
        self.steps: list[dict[str, float]] = []

    def named(self, part: str, function: Callable) -> Callable:
        """The function, each of whose calls counts for this part."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            within = self.under_way[-1] if self.under_way else None
            with record_function(part):
                self.under_way.append(part)
                start = self._mark()
                try:
                    return function(*arguments, **options)
                finally:
                    self.spans.append(Span(part, within, start, self._mark()))
                    self.under_way.pop()

        return call

    @contextmanager
    def watching(self, state: TrainState) -> Iterator[None]:
        """Meanwhile the calls in `state`'s steps are named."""
        places = (
            (step, "lerp_each_", "momentum_update"),
            *((passes, "keys", "keys") for passes in (WholePasses, MicroPasses)),
            *((passes, "queries", "queries_and_loss") for passes in (WholePasses, MicroPasses)),
            (step, "contrastive_loss", "queries_and_loss"),
            *((passes, "backward", "backward") for passes in (WholePasses, MicroPasses)),
            (state.update, "apply", "optimizer"),
        )
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(_replaced(owner, name, self.named(part, getattr(owner, name))))
            yield

    def end_step(self) -> None:
        """What was counted since the last call is a step's; `other` is what no part has of the whole."""
        finish(self.device)
        ms: dict[str, float] = defaultdict(float)
        for span in self.spans:
            spent = self._ms(span)
            ms[span.part] += spent
            if span.within is not None:
                ms[span.within] -= spent
        ms[OTHER] = ms.pop(WHOLE)
        self.steps.append(dict(ms))
        self.spans.clear()

    def medians(self) -> dict[str, float]:
        """Milliseconds per part, over the steps."""
        return {part: median(ms[part] for ms in self.steps) for part in self.steps[0]}

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, span: Span) -> float:
        return span.start.elapsed_time(span.end) if self.on_gpu else 1e3 * (span.end - span.start)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)  # a method is its class's
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)
