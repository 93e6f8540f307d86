"""A batch goes to a GPU while the step before it computes.

The loop asks for a batch once the step before it has been launched, and the GPU is then still busy with that step. So
it is enough to copy on another stream than that of the steps; no batch is asked for before its time. After a step that
is logged the host has waited for it, and the copy has nothing to hide behind. The host is at most one step ahead
(engine.runs.news), so no more than two batches are on the GPU.
"""

from functools import cache

import torch
from torch import Tensor


def uploaded(pixels: Tensor, device: torch.device) -> Tensor:
    """The same on the device; pixels that are there already as they are. What is launched next waits for the copy, the
    host does not.

    pixels: of any shape, in pinned memory where the device is a GPU.
    """
    if device.type != "cuda":
        return pixels.to(device)
    steps, side = torch.cuda.current_stream(device), _side_stream(device)
    with torch.cuda.stream(side):
        copy = pixels.to(device, non_blocking=True)
    steps.wait_stream(side)
    copy.record_stream(steps)  # once let go, its memory is used again only after what the steps still do with it
    return copy


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all batches: memory that was allocated for a stream serves that stream alone."""
    return torch.cuda.Stream(device)
