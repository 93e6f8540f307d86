"""How much of a GPU's memory linear classification takes, counted before there is a GPU.

A frozen network keeps nothing for a backward pass: what counts is the moment of its forward pass when most is there.
Real modules go forward once, as engine.training.memory has them do it; what is not counted there is not counted here.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from engine.evaluation.features import BATCH
from engine.recipe.sections import Linear
from engine.torch_internals import watching, without_data
from engine.training.memory import CROPS, Memory
from models.architecture import Architecture

FLOAT = 4  # bytes of a number


def memory_of_linear(recipe: Linear, architecture: Architecture, image_size: int, classes: int, gpus: int) -> Memory:
    """Of a run on so many GPUs, which divide the batch; each has all of the network, in float32."""
    with torch.device("meta"):
        trunk = architecture.build()
    crops = max(recipe.train.global_batch_size // gpus, BATCH)  # validation images come so many at a time
    numbers = sum(tensor.numel() for tensor in (*trunk.module.parameters(), *trunk.module.buffers()))
    classifier = 4 * classes * (trunk.width + 1)  # with its momentum, and both as they were before the step
    return Memory(
        weights=FLOAT * (numbers + classifier),
        gathered=0,
        trunk=crops * most_alive(trunk.module, (CROPS, 3, image_size, image_size)) / CROPS,
        backward=0,
        heads=0,  # nothing of the classifier's is there yet
        images=crops * 3 * image_size**2 * (2 + FLOAT),  # in bytes, those of the next step too, and as numbers
    )


class _Alive:
    """Bytes of what operations made and is still there: now, and most so far."""

    def __init__(self, module: nn.Module):
        self.now = self.most = 0
        self.seen = {id(tensor.untyped_storage()) for tensor in (*module.parameters(), *module.buffers())}

    def see(self, _: Any, results: Any) -> None:
        for tensor in results if isinstance(results, tuple | list) else (results,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.seen:
                self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(id(storage))
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, place: int, count: int) -> None:
        self.seen.discard(place)
        self.now -= count


def most_alive(module: nn.Module, shape: tuple[int, ...]) -> int:
    """The most bytes that a forward without gradients has at once, beside an input of this shape.

    Args:
        module: on the meta device; not to be used afterwards.
    """
    with without_data(), torch.no_grad():
        module.eval().to_empty(device="cpu")  # not meta, where attention has another form
        images, alive = torch.empty(shape), _Alive(module)
        alive.seen.add(id(images.untyped_storage()))
        with watching(alive.see):
            module(images)
    return alive.most
