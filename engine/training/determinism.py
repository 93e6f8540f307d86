"""Whether the same step gives the same bits again: how torch is told, and a trial of what it can."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.recipe.sections import Parallel
from engine.training.parallelize import dtype_of, trunk_dtype_of
from models.dry_step import refused_in_step


@contextmanager
def deterministic(wanted: bool, refused: str | None = None) -> Iterator[None]:
    """Within it every operation gives the same bits for the same input, or whatever is fastest where not `wanted`.

    What has no deterministic form raises RuntimeError, unless one such operation is known to be needed (`refused`):
    then each of them warns, and the rest stays deterministic.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    # Where it must not warn only, torch passes over cuDNN's attention, and the backward passes of flash and
    # memory-efficient attention add in a fixed order. Where it may, none of these three do: their plain form is left.
    attention = sdpa_kernel(SDPBackend.MATH) if wanted and refused else nullcontext()
    torch.utils.deterministic.fill_uninitialized_memory = False  # only wanted for finding bugs, and slow
    torch.use_deterministic_algorithms(wanted, warn_only=refused is not None)
    try:
        with attention:
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def refused_in_trial(
    build: Callable[[], nn.Module], image_size: int, parallel: Parallel, device: torch.device
) -> str | None:
    """The first operation of a small step that has no deterministic form on the device; None where each has one.

    Args:
        build: makes a trunk as it will be trained, on the device of torch's context; the trial's own, and gone with it.
    """
    on_cuda = device.type == "cuda"
    try:
        # Whoever fills a network with random numbers takes them from the global generators.
        with deterministic(True), torch.random.fork_rng([device.index] if on_cuda else []), torch.device(device):
            return refused_in_step(build().to(dtype_of(parallel)), image_size, trunk_dtype_of(parallel))
    finally:
        if on_cuda:
            torch.cuda.empty_cache()
