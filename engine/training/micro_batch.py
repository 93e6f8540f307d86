"""A step's forward and backward passes, over the whole batch at once or over one micro-batch after another.

In micro-batches both trunks go forward without a graph, and their features alone are kept. Heads and loss see the
features of the whole batch, as ever. Then the base trunk goes over the micro-batches again, with a graph, and takes
each back with the gradient that the loss gave its features (Gao et al., arXiv 2101.06983). That is the step of the
whole batch to rounding, wherever a trunk looks at each image alone; the memory for the trunk's backward pass is that of
one micro-batch, and the base trunk goes forward twice.

Shapes: V views, B images of this rank, M images of a micro-batch, D feature width, P width of queries and keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.training.parallelize import add_up_gradients
from models.moco import MoCo


@dataclass(frozen=True)
class MicroBatches:
    """A rank's images, [V*B, 3, H, W] in all, which are never in memory together.

    Args:
        make: from a slice of the B images to their views [V*M, 3, H, W]: the same whenever it is called.
        batch: B.
        size: M, which divides B.
    """

    make: Callable[[slice], Tensor]
    batch: int
    size: int

    def rows(self) -> list[slice]:
        return [slice(first, first + self.size) for first in range(0, self.batch, self.size)]


class WholePasses:
    """Of all images at once."""

    def __init__(self, moco: MoCo, images: Tensor):
        self.moco, self.images = moco, images

    def keys(self) -> Tensor:
        """Keys [V*B, P], without gradient."""
        return self.moco.keys(self.images)

    def queries(self) -> tuple[Tensor, Tensor]:
        """Base features [V*B, D] and queries [V*B, P]."""
        return self.moco.queries(self.images)

    def backward(self, loss: Tensor) -> None:
        """Give every trained parameter its gradient, of all ranks."""
        loss.backward()


class MicroPasses:
    """The same of micro-batches. Keys come first: on their way the images pass the base trunk too, and are made once
    for both encoders."""

    def __init__(self, moco: MoCo, images: MicroBatches):
        self.moco, self.images = moco, images

    @torch.no_grad()
    def keys(self) -> Tensor:
        pairs = [self._features(self.images.make(rows)) for rows in self.images.rows()]
        momentum, base = zip(*pairs, strict=True)
        self.features = self._in_order(base).requires_grad_()  # where the gradient of the loss will end
        return self.moco.momentum.projector(self._in_order(momentum))

    def queries(self) -> tuple[Tensor, Tensor]:
        return self.features, self.moco.predictor(self.moco.base.projector(self.features))

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        trunk, gradient = self.moco.base.trunk, self.features.grad
        assert gradient is not None
        gradient_VBD = gradient.unflatten(0, (self.moco.views, -1))
        for rows in self.images.rows():
            add_up_gradients(trunk, last=rows.stop == self.images.batch)
            trunk(self.images.make(rows)).backward(gradient_VBD[:, rows].flatten(0, 1))

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.moco.momentum.trunk(images), self.moco.base.trunk(images)

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Features of micro-batches [V*M, D] as those of the batch [V*B, D]: view 1's, then view 2's."""
        return torch.cat([part.unflatten(0, (self.moco.views, -1)) for part in parts], dim=1).flatten(0, 1)


def passes_over(images: Tensor | MicroBatches, moco: MoCo) -> WholePasses | MicroPasses:
    """The passes of one step: keys, queries and backward, in this order."""
    return WholePasses(moco, images) if isinstance(images, Tensor) else MicroPasses(moco, images)
