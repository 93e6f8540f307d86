"""Which networks have a name, and the shapes of those that are built here. Pure data; nothing heavy is imported.

Vision transformers (paper, table 2 and the text on the conv stem). patch_size: side of a token in pixels. With a conv
stem it is the stem's total stride, a power of two: log2(patch_size) convolutions of stride 2 whose widths double up to
dim. ViT-S has 12 heads here, where others give it 6; a conv stem takes the place of one block.
"""

import re
from typing import Any

VIT_SHAPES = {
    "vit_small": {"patch_size": 16, "dim": 384, "depth": 12, "heads": 12, "conv_stem": False},
    "vit_base": {"patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "conv_stem": False},
    "vit_large": {"patch_size": 16, "dim": 1024, "depth": 24, "heads": 16, "conv_stem": False},
    "vit_huge": {"patch_size": 14, "dim": 1280, "depth": 32, "heads": 16, "conv_stem": False},
    "vit_conv_small": {"patch_size": 16, "dim": 384, "depth": 11, "heads": 12, "conv_stem": True},
    "vit_conv_base": {"patch_size": 16, "dim": 768, "depth": 11, "heads": 12, "conv_stem": True},
}
# `vit` and `vit_conv` have no shape of their own: the recipe says all of it.
PLAIN_VITS = ("vit", "vit_small", "vit_base", "vit_large", "vit_huge")
CONV_VITS = ("vit_conv", "vit_conv_small", "vit_conv_base")
VIT_KEYS = ("patch_size", "dim", "depth", "heads")  # of a shape: what a caller may say himself
RESNET_SHAPES = {  # torchvision's bottleneck networks: blocks per stage, width
    "resnet50": {"layers": [3, 4, 6, 3], "width_per_group": 64},
    "resnet101": {"layers": [3, 4, 23, 3], "width_per_group": 64},
    "resnet152": {"layers": [3, 8, 36, 3], "width_per_group": 64},
    "wide_resnet50_2": {"layers": [3, 4, 6, 3], "width_per_group": 128},
    "wide_resnet101_2": {"layers": [3, 4, 23, 3], "width_per_group": 128},
}
TIMM = "timm/"
# Those of timm's that are often asked for by less than their name.
WELL_KNOWN = (
    *("timm/vit_tiny_patch16_224", "timm/vit_small_patch14_dinov2", "timm/deit_tiny_patch16_224"),
    *("timm/resnet18", "timm/resnet34", "timm/convnext_tiny", "timm/convnext_small", "timm/efficientnet_b0"),
    *("timm/swin_tiny_patch4_window7_224", "timm/mobilenetv3_small_100", "timm/regnety_016"),
)
# How timm's plain vision transformers begin; whoever builds a timm trunk looks at the network itself.
TIMM_VIT = re.compile(TIMM + "(aimv2|beit3|deit|eva|flexivit|test_vit|vit)")


def is_network(name: str) -> bool:
    """Whether a network may have this name; which models timm has, timm alone knows."""
    return name in (*PLAIN_VITS, *CONV_VITS, *RESNET_SHAPES) or re.fullmatch(TIMM + r"[\w.-]+", name) is not None


def may_freeze_patches(name: str) -> bool:
    """Whether the network may be a ViT with a patch projection, which pre-training can leave as it was drawn."""
    return name in PLAIN_VITS or TIMM_VIT.match(name) is not None


def vit_shape(name: str, **own: int | None) -> dict[str, Any] | None:
    """{patch_size, dim, depth, heads, conv_stem} of a ViT: `own` values, where they are not None, over the named ones.

    None for networks that bring their shape (ResNets, timm's).
    """
    if name not in PLAIN_VITS + CONV_VITS:
        return None
    named = VIT_SHAPES.get(name, {"conv_stem": name in CONV_VITS})
    return named | {key: value for key, value in own.items() if value is not None}
