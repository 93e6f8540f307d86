"""Shapes of the named vision transformers (paper, table 2 and the text on the conv stem). Pure data.

patch_size: side of a token in pixels. With a conv stem it is the stem's total stride, a power of two: log2(patch_size)
convolutions of stride 2 whose widths double up to dim. ViT-S has 12 heads here, where others give it 6; a conv stem
takes the place of one block.
"""

VIT_SHAPES = {
    "vit_small": {"patch_size": 16, "dim": 384, "depth": 12, "heads": 12, "conv_stem": False},
    "vit_base": {"patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "conv_stem": False},
    "vit_large": {"patch_size": 16, "dim": 1024, "depth": 24, "heads": 16, "conv_stem": False},
    "vit_huge": {"patch_size": 14, "dim": 1280, "depth": 32, "heads": 16, "conv_stem": False},
    "vit_conv_small": {"patch_size": 16, "dim": 384, "depth": 11, "heads": 12, "conv_stem": True},
    "vit_conv_base": {"patch_size": 16, "dim": 768, "depth": 11, "heads": 12, "conv_stem": True},
}
