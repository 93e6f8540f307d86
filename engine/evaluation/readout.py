"""Which numbers of a trunk are its features: the trunk's own output, or another view on a ViT's tokens.

Shapes: B images, T tokens (prefix tokens such as CLS first), D width, n blocks.
"""

import re

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from engine.errors import UserError
from models.vit import ClsTransformer

CHOICES = "own, cls, mean or last<n>, such as last4"


def readout(trunk: nn.Module, choice: str) -> nn.Module:
    """A module from images [B, 3, S, S] to features, over the same trunk.

    own: what the trunk gives (a ViT's CLS token here). cls: the CLS token after the final norm. mean: the average of
    the patch tokens after it. last<n>: the CLS tokens of the last n blocks, each after the final norm, side by side.

    Raises:
        UserError: there is no such choice, or the trunk has no such tokens or blocks.
    """
    if choice == "own" or (choice == "cls" and isinstance(trunk, ClsTransformer)):
        return trunk
    last = re.fullmatch(r"last([1-9][0-9]*)", choice)
    if choice not in ("cls", "mean") and not last:
        raise UserError(f"--features ({choice}) must be {CHOICES}; pass one of them")
    if not isinstance(trunk, VisionTransformer):
        raise UserError(f"--features ({choice}) must be own for a {type(trunk).__name__}, which is no plain ViT")
    if choice != "mean" and not trunk.has_class_token:
        raise UserError(f"--features ({choice}) must be own or mean for a ViT without CLS token")
    count = int(last[1]) if last else 0
    if count > len(trunk.blocks):
        raise UserError(f"--features ({choice}) must be at most last{len(trunk.blocks)}: the trunk has no more blocks")
    return LastBlocks(trunk, count) if last else Tokens(trunk, choice)


class Tokens(nn.Module):
    """CLS token or mean patch token after the final norm: [B, D]."""

    def __init__(self, trunk: VisionTransformer, choice: str):
        super().__init__()
        self.trunk, self.choice = trunk, choice

    def forward(self, images: Tensor) -> Tensor:
        token_BTD = self.trunk.forward_features(images)
        return token_BTD[:, 0] if self.choice == "cls" else token_BTD[:, self.trunk.num_prefix_tokens :].mean(1)


class LastBlocks(nn.Module):
    """CLS tokens of the last n blocks, each normed, side by side: [B, n * D], earliest first."""

    def __init__(self, trunk: VisionTransformer, count: int):
        super().__init__()
        self.trunk, self.count = trunk, count

    def forward(self, images: Tensor) -> Tensor:
        pairs = self.trunk.get_intermediate_layers(images, n=self.count, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix_B1D[:, 0] for _, prefix_B1D in pairs], dim=1)
