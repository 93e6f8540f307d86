"""Vision transformers as MoCo v3 builds them, on timm's VisionTransformer (paper sections 4.2 and 5).

Shapes: N images, T tokens (CLS first), D channels, H heads, E = D / H channels of a head.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from models.attention import attend
from models.drop_path import drop_path_places
from models.gelu import Gelu
from models.initial import seeded
from models.norm import GlobalBatchNorm
from models.trunk import Trunk, as_convolutions_want

WAVELENGTH = 10_000.0  # of the slowest sine, in patches / 2 pi
NORM_EPS = 1e-6  # what LayerNorms add to the variance, as the reference's, timm's and DeiT's do


def build_vit(*, image_size: int, patch_size: int, dim: int, depth: int, heads: int, conv_stem: bool = False) -> Trunk:
    """A pre-norm ViT whose CLS token is the feature: [N, 3, H, W] -> [N, D]. Positions are fixed sines and cosines."""
    make = partial(
        ClsTransformer,
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        qkv_bias=True,
        num_classes=0,
        global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
        weight_init="skip",
        block_fn=ClsBlock,
        act_layer=Gelu,
        embed_layer=ConvStem if conv_stem else PatchProjection,
    )
    module = make()
    module.pos_embed.requires_grad_(False)
    return Trunk(
        module,
        dim,
        is_vit=True,
        initial_values=seeded(initial_value, grid=module.patch_embed.grid_size),
        drop_paths=partial(drop_path_places, lambda highest: make(drop_path_rate=highest), image_size),
        layers=module.group_matcher(coarse=False),
        no_weight_decay=frozenset(module.no_weight_decay()),
    )


class ClsTransformer(VisionTransformer):
    """timm's, whose forward ends in the CLS token and computes nothing that this does not need: in the last block keys
    and values of all tokens, but query, projection and MLP of CLS alone.

    `forward_features` and all other methods are timm's, and give all tokens.
    """

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> the CLS token after the final norm, [N, D]."""
        token_NTD = self.stem_forward(images)
        *before, last = self.blocks
        for block in before:
            token_NTD = block(token_NTD)
        return self.norm(last(token_NTD, cls_only=True))

    def stem_forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> the first block's input, [N, T, D]."""
        # Not len(images), which is a plain number and would fix N in an exported program.
        cls_N1D = self.cls_token.expand(images.shape[0], -1, -1)
        return torch.cat([cls_N1D, self.patch_embed(images)], dim=1) + self.pos_embed


class ClsBlock(Block):
    """timm's, which can give the new CLS token alone."""

    def forward(self, token_NTD: Tensor, *options: Any, cls_only: bool = False, **named_options: Any) -> Tensor:
        """[N, T, D] -> [N, T, D], or [N, D] with `cls_only`."""
        if options or named_options:
            return super().forward(token_NTD, *options, **named_options)
        if not cls_only:
            token_NTD = token_NTD + self.drop_path1(attend(self.attn, self.norm1(token_NTD)))
            return token_NTD + self.drop_path2(self.mlp(self.norm2(token_NTD)))
        cls_ND = token_NTD[:, 0]
        cls_ND = cls_ND + self.drop_path1(cls_attention(self.attn, self.norm1(token_NTD)))
        return cls_ND + self.drop_path2(self.mlp(self.norm2(cls_ND)))


def cls_attention(attention: Attention, token_NTD: Tensor) -> Tensor:
    """What `attention` gives for the first token, [N, D]."""
    parts = (token_NTD.shape[-1], 2 * token_NTD.shape[-1])  # query; key and value
    (q_weight, kv_weight), (q_bias, kv_bias) = attention.qkv.weight.split(parts), attention.qkv.bias.split(parts)
    q_ND = F.linear(token_NTD[:, 0], q_weight, q_bias)
    q_NH1E = q_ND.unflatten(1, (attention.num_heads, 1, -1))
    kv_NT2HE = F.linear(token_NTD, kv_weight, kv_bias).unflatten(2, (2, attention.num_heads, -1))
    k_NHTE, v_NHTE = kv_NT2HE.permute(2, 0, 3, 1, 4).unbind()
    return attention.proj(F.scaled_dot_product_attention(q_NH1E, k_NHTE, v_NHTE).flatten(1))


class PatchProjection(PatchEmbed):
    """timm's convolution of patches that do not overlap, as the matrix product that it is; as a convolution in bf16 it
    takes a GPU several times as long. [N, 3, H, W] -> [N, tokens, D]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.strict_img_size and x.shape[2:] != self.img_size:
            given, own = (" x ".join(map(str, size)) for size in (x.shape[2:], self.img_size))
            raise ValueError(f"images ({given}) must be of {own} pixels; resize them")
        rows, columns = self.patch_size
        x = x[..., : x.shape[2] // rows * rows, : x.shape[3] // columns * columns]
        patches = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class ConvStem(nn.Module):
    """Stride-2 convolutions instead of the patch projection, one for each halving that `patch_size` asks for.

    Widths double up to D; BatchNorm and ReLU follow each; a 1x1 convolution ends the stem. The constructor and the
    attributes are those that timm expects of an `embed_layer`. [N, 3, H, W] -> [N, tokens, D].
    """

    strict_img_size = True

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: object):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or embed_dim % 2 ** (halvings - 1):
            raise ValueError(
                f"a conv stem's patch size ({patch_size}) must be a power of two whose half divides dim ({embed_dim})"
            )
        widths = [in_chans, *(embed_dim >> (halvings - n) for n in range(1, halvings + 1))]
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise(widths):
            convolution = nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1, bias=False)
            layers += [convolution, GlobalBatchNorm(wide_out), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        side = -(-img_size // patch_size)  # padding rounds every halving up
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size, self.num_patches = (side, side), side * side

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(as_convolutions_want(x)).flatten(2).transpose(1, 2)


def sincos_position(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed 2-D sin-cos position embedding with a zero for CLS, [1, 1 + rows*columns, dim] float32.

    Four quarters of the channels: sin and cos of the row, sin and cos of the column; patches count row by row.

    Raises:
        ValueError: dim is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"dim ({dim}) must be divisible by 4 for a sin-cos position embedding")
    frequency_F = WAVELENGTH ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row_N, column_N = (c.flatten() for c in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    row_NF, column_NF = row_N[:, None] * frequency_F, column_N[:, None] * frequency_F
    patches_ND = torch.cat([row_NF.sin(), row_NF.cos(), column_NF.sin(), column_NF.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim), patches_ND.float()])[None]


def initial_value(name: str, shape: torch.Size, generator: torch.Generator, grid: tuple[int, int]) -> Tensor:
    """A ViT parameter before training (appendix A, "ViT"), float32.

    Linear layers are Xavier-uniform, where the query, key and value thirds of `qkv` count as three layers; the patch
    projection is Xavier-uniform over its flattened patch; a conv stem keeps PyTorch's default.
    """
    if name == "pos_embed":
        return sincos_position(*grid, dim=shape[-1])
    if name == "cls_token":
        return torch.empty(shape).normal_(0, 1e-6, generator=generator)
    if name.startswith("patch_embed.proj.") and len(name.split(".")) == 4:
        return _conv_stem_value(name, shape, generator)
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    fan_out, fan_in = shape[0], shape[1:].numel()
    if name.endswith("qkv.weight"):
        fan_out //= 3
    bound = (6 / (fan_out + fan_in)) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _conv_stem_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    layer, kind = int(name.split(".")[2]), name.split(".")[3]
    if len(shape) == 4:
        bound = shape[1:].numel() ** -0.5
    elif layer % 3 == 0:  # the bias of the closing 1x1 convolution: fan-in D
        bound = shape[0] ** -0.5
    else:
        return torch.ones(shape) if kind == "weight" else torch.zeros(shape)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
