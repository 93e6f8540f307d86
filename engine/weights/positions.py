"""Position embeddings of a ViT with CLS: their grid, and whether they are this method's.

Shapes: N patches, D width.
"""

import torch
from torch import Tensor

from models.vit import sincos_position

SAME = 1e-5  # implementations of the sine differ by less; learned embeddings by far more


def side(shape: torch.Size) -> int:
    """Patches along one side of a square grid beside CLS, of positions [1, 1 + N, D]; 0 for anything else."""
    root = round(max(shape[1] - 1, 0) ** 0.5)
    return root if root * root == shape[1] - 1 else 0


def is_sincos(position: Tensor) -> bool:
    """Whether positions [1, 1 + N, D] of a square grid are MoCo v3's sines, which MAE's are not."""
    grid, dim = side(position.shape), position.shape[2]
    return dim % 4 == 0 and bool((position - sincos_position(grid, grid, dim)).abs().max() <= SAME)
