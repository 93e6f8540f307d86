"""Numbers of the device, brought to the host."""

import time
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor

LOOK_SECONDS = 0.0005  # between two looks at the device: signals are heard, and no core is busy with waiting


class HostCopy:
    """Numbers on their way to the host.

    within: how long they may take. A device that waits for a lost rank never delivers them.
    """

    def __init__(self, numbers: Tensor, within: timedelta):
        self.copy = numbers.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.within = within
        self.arrival = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrival is not None:
            self.arrival.record()

    def numbers(self) -> list[float]:
        """The numbers, once they have arrived. Raises RuntimeError, in gloo's words, where they do not come in time."""
        begun = time.monotonic()
        while self.arrival is not None and not self.arrival.query():
            if time.monotonic() - begun > self.within.total_seconds():
                raise RuntimeError(f"Timed out waiting {self.within / timedelta(milliseconds=1):.0f}ms for the GPU")
            time.sleep(LOOK_SECONDS)
        return self.copy.tolist()


def on_host(numbers: Mapping[str, Tensor | float], within: timedelta) -> dict[str, float]:
    """The same as plain numbers: those on the device come in one copy, for which it is waited once."""
    tensors = {name: number for name, number in numbers.items() if isinstance(number, Tensor)}
    values = HostCopy(torch.stack([tensor.double() for tensor in tensors.values()]), within).numbers()
    pairs = zip(tensors.items(), values, strict=True)
    found = {name: number for name, number in numbers.items() if not isinstance(number, Tensor)}
    found |= {name: value if tensor.is_floating_point() else int(value) for (name, tensor), value in pairs}
    return {name: found[name] for name in numbers}
