"""What a vision transformer's class token looks at.

Shapes: B images, H heads, N tokens, R rows and C columns of patches, S side of an image.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from engine.errors import UserError
from engine.evaluation.subject import open_subject
from engine.pictures.canvas import FAINT, HEADER, MARGIN, WIDTH, Sheet, style
from engine.pictures.features import read_view
from engine.weights.weights import EncoderName

GAP = 6
LINE = 20  # of text below an image
HEAT = "inferno"


def show_attention(checkpoint: str, encoder: EncoderName, heads: int | None, image_file: Path, out: Path) -> None:
    """Draws where the class token of a CHECKPOINT's ViT looks in an image. Raises UserError for no ViT or image."""
    subject = open_subject(checkpoint, "cpu", encoder=encoder, heads=heads)
    check_attention(subject.network, checkpoint)
    image_3SS = read_view("IMAGE", image_file, subject.crop)
    attention_HRC = class_attention(subject.network, subject.normalised(image_3SS[None], "cpu"))[0]
    title = f"What the class token looks at: {image_file.name}"
    subtitle = "Attention to each patch in the last block; brightest: the largest of each picture"
    draw_attention(image_3SS.permute(1, 2, 0).numpy(), attention_HRC.numpy(), title, subtitle, out)


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
    to registers is left out, so that a head's weights add up to at most 1. The trunk has passed `check_attention`.
    """
    attention = trunk.blocks[-1].attn
    weights_BHNN = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        weights_BHNN.append(arguments[0])

    fused = attention.fused_attn
    attention.fused_attn = False  # the fused kernel never holds the weights
    hook = attention.attn_drop.register_forward_pre_hook(keep)
    try:
        trunk.forward_features(images_B3SS)  # all tokens: the forward of a trunk may leave queries out
    finally:
        hook.remove()
        attention.fused_attn = fused
    rows, columns = trunk.patch_embed.grid_size
    return weights_BHNN[0][:, :, 0, trunk.num_prefix_tokens :].unflatten(2, (rows, columns))


# ---- the drawing -----------------------------------------------------------------------------------------------------


def draw_attention(image_SS3: np.ndarray, attention_HRC: np.ndarray, title: str, subtitle: str, out: Path) -> None:
    """The image, the mean over heads laid over it, and every head."""
    heads = len(attention_HRC)
    rows = max(1, round(heads**0.5))
    columns = -(-heads // rows)
    # Two large squares as high as the rows of small ones fill the width; under each stands a line of text.
    small = (WIDTH - 2 * MARGIN - 4 * GAP - (columns - 1) * GAP - 2 * (rows - 1) * (GAP + LINE)) / (2 * rows + columns)
    large = rows * small + (rows - 1) * (GAP + LINE)
    with style():
        sheet = Sheet(HEADER + large + LINE + MARGIN, title, subtitle)
        sheet.image(MARGIN, HEADER, large, image_SS3)
        sheet.text(MARGIN, HEADER + large + 15, "image", color=FAINT)
        x = MARGIN + large + 2 * GAP
        sheet.image(x, HEADER, large, _heated(image_SS3, attention_HRC.mean(0)))
        sheet.text(x, HEADER + large + 15, "mean over heads", color=FAINT)
        x += large + 2 * GAP
        for head, weight_RC in enumerate(attention_HRC):
            row, column = divmod(head, columns)
            left, top = x + column * (small + GAP), HEADER + row * (small + GAP + LINE)
            sheet.image(left, top, small, weight_RC, cmap=HEAT, vmin=0)
            sheet.text(left, top + small + 15, f"head {head + 1}", color=FAINT)
        sheet.save(out)


def _heated(image_SS3: np.ndarray, weight_RC: np.ndarray) -> np.ndarray:
    """The image in grey, coloured by how large the weights are."""
    side = len(image_SS3)
    row_S, column_S = (np.arange(side) * patches // side for patches in weight_RC.shape)
    heat_SS3 = colormaps[HEAT](weight_RC / max(weight_RC.max(), np.finfo(float).tiny))[row_S][:, column_S, :3]
    grey_SS1 = image_SS3.mean(axis=2, keepdims=True) / 255
    return 0.4 * grey_SS1 + 0.6 * heat_SS3
