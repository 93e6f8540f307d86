"""How a step's time divides: the functions that `train_step` calls, timed from outside for as long as one looks."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from statistics import median
from typing import Any

import torch
from torch.profiler import record_function

from engine.benchmarks.clock import finish
from engine.training import step
from engine.training.step import TrainState

WHOLE, AUGMENTATION, OTHER = "step", "augmentation", "other"


class Parts:
    """Milliseconds of each part of each step: between events on a GPU, CPU time on a CPU. In a profile the parts are
    ranges of these names."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.device = device.type == "cuda", device
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.steps: list[dict[str, float]] = []

    def named(self, part: str, function: Callable) -> Callable:
        """The function, each of whose calls counts for this part."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with record_function(part):
                start = self._mark()
                try:
                    return function(*arguments, **options)
                finally:
                    self.spans[part].append((start, self._mark()))

        return call

    @contextmanager
    def watching(self, state: TrainState) -> Iterator[None]:
        """Meanwhile the calls in `state`'s steps are named."""
        places = (
            (step, "lerp_each_", "momentum_update"),
            (state.moco, "keys", "keys"),
            (state.moco, "queries", "queries_and_loss"),
            (step, "contrastive_loss", "queries_and_loss"),
            (torch.autograd, "backward", "backward"),
            (state.update, "apply", "optimizer"),
        )
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(_replaced(owner, name, self.named(part, getattr(owner, name))))
            yield

    def end_step(self) -> None:
        """What was counted since the last call is a step's; `other` is what no part has of the whole."""
        finish(self.device)
        ms = {part: sum(map(self._ms, spans)) for part, spans in self.spans.items()}
        whole = ms.pop(WHOLE)
        self.steps.append(ms | {OTHER: whole - sum(ms.values())})
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

    def _ms(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)  # a method is its class's
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)
