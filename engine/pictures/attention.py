"""What a vision transformer's class token looks at.

Shapes: B images, H heads, N tokens, R rows and C columns of patches.
"""

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from engine.errors import UserError


def check_attention(trunk: nn.Module, origin: str) -> None:
    """Raises UserError, which calls the trunk `origin`, where it is no ViT with a class token."""
    if not isinstance(trunk, VisionTransformer | Eva | Beit):
        found = f"a {type(trunk).__name__}"
    elif trunk.cls_token is None:
        found = "one without"
    elif not hasattr(getattr(trunk.blocks[-1], "attn", None), "attn_drop"):
        found = f"one of {type(trunk.blocks[-1]).__name__}s, which hide their attention"
    else:
        return
    raise UserError(f"CHECKPOINT ({origin}) must be of a ViT with a class token, and is {found}; pass one of a ViT")


@torch.no_grad()
def class_attention(trunk: nn.Module, images_B3SS: Tensor) -> Tensor:
    """How much of its attention the class token pays to each patch in the last block: [B, H, R, C].

    The weights are those of the block's own forward pass, after its softmax. What the class token pays to itself and
    to registers is left out, so that a head's weights add up to at most 1.
    """
    attention = trunk.blocks[-1].attn
    weights_BHNN = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        weights_BHNN.append(arguments[0])

    fused = attention.fused_attn
    attention.fused_attn = False  # the fused kernel never holds the weights
    hook = attention.attn_drop.register_forward_pre_hook(keep)
    try:
        trunk(images_B3SS)
    finally:
        hook.remove()
        attention.fused_attn = fused
    rows, columns = trunk.patch_embed.grid_size
    return weights_BHNN[0][:, :, 0, trunk.num_prefix_tokens :].unflatten(2, (rows, columns))
