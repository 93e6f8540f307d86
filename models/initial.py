"""Initial weights as a function of the seed and a parameter's name alone.

A network is built on the meta device and filled one parameter at a time, so no rank ever needs all of it at once, and
the values do not depend on how many ranks there are.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Draw = Callable[[str, torch.Size], Tensor]  # (parameter's name, shape) -> its initial value, float32 on the CPU


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose numbers depend on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def seeded(rule: Callable[..., Tensor], **fixed: object) -> Callable[[int], Draw]:
    """Turn `rule(name, shape, generator, **fixed)` for parameters into a function from a seed to a `Draw`.

    BatchNorm's buffers start as BatchNorm starts them.
    """

    def draw(seed: int, name: str, shape: torch.Size) -> Tensor:
        if name.endswith(("running_mean", "num_batches_tracked")):
            return torch.zeros(shape)
        if name.endswith("running_var"):
            return torch.ones(shape)
        return rule(name, shape, generator_for(seed, name), **fixed)

    return lambda seed: partial(draw, seed)
