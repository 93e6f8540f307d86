"""A trunk that no strict mode lets train, on any device."""

import torch.nn.functional as F
from torch import Tensor, nn


class Unpooled(nn.Module):
    """Images [N, 3, S, S] -> [N, 3], by an operation without a deterministic form."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        pooled, place = F.max_pool2d(self.convolution(images), 2, return_indices=True)
        return F.max_unpool2d(pooled, place, 2).mean((2, 3))
