"""Self-attention of a ViT's tokens: torch's, or compiled for a GPU a kernel of our own for sequences as short as these.

Shapes: N images, T tokens, D channels, H heads, E = D / H channels of a head.
"""

from importlib.util import find_spec
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

HAS_TRITON = find_spec("triton") is not None
LONGEST = 256  # tokens whose keys one program holds
SHARED_BYTES = 160 * 1024  # of a program: data centres' GPUs have them from the A100 on; others have 100 KiB or less
FORWARD = {"Q": 64, "num_warps": 4}
BACKWARD = {  # by E
    32: {"Q": 64, "STAGES": 1, "num_warps": 8},
    64: {"Q": 32, "STAGES": 3, "num_warps": 8},
}


def attend(attention: Attention, token_NTD: Tensor) -> Tensor:
    """What `attention` gives for all tokens, [N, T, D]."""
    if not (attention.fused_attn and is_short(token_NTD, attention.head_dim)):
        return attention(token_NTD)
    qkv_NT3HE = attention.qkv(token_NTD).unflatten(2, (3, attention.num_heads, attention.head_dim))
    return attention.proj(short_scaled_dot_product_attention(qkv_NT3HE)[0].flatten(2))


def is_short(token_NTD: Tensor, width: int) -> bool:
    """Whether the kernel is for such tokens and heads: in compiled code, which needs Triton and a C compiler too."""
    if token_NTD.device.type != "cuda" or torch.version.hip or token_NTD.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = token_NTD.shape[1] <= LONGEST and width in BACKWARD
    return fits and torch.compiler.is_dynamo_compiling() and HAS_TRITON and has_room(token_NTD.device)


@torch.compiler.assume_constant_result
def has_room(device: torch.device) -> bool:
    """Whether the kernel's tiles fit into the shared memory of this GPU. One that is not there has room."""
    if not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= SHARED_BYTES


@torch.library.custom_op("mocov3::short_scaled_dot_product_attention", mutates_args=())
def short_scaled_dot_product_attention(qkv_NT3HE: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each head, [N, T, H, E], and what its backward pass needs beside it, [N, H, T] float32.

    Queries, keys and values lie side by side, as one projection gives them. The same bits every time.
    """
    N, T, _, H, _ = qkv_NT3HE.shape
    out_NTHE, log_sum_NHT = _allocate(qkv_NT3HE)
    tiles = -(-T // FORWARD["Q"])
    # In one dimension: a grid's others end at 65,535 programs, fewer than the heads of 4,096 images may be.
    _launch("forward", N * H * tiles, FORWARD, qkv_NT3HE.contiguous(), out_NTHE, log_sum_NHT)
    return out_NTHE, log_sum_NHT


@short_scaled_dot_product_attention.register_fake
def _allocate(qkv_NT3HE: Tensor) -> tuple[Tensor, Tensor]:
    N, T, _, H, E = qkv_NT3HE.shape
    return qkv_NT3HE.new_empty(N, T, H, E), qkv_NT3HE.new_empty(N, H, T, dtype=torch.float32)


@torch.library.custom_op("mocov3::short_scaled_dot_product_attention_backward", mutates_args=())
def backward(d_out_NTHE: Tensor, qkv_NT3HE: Tensor, out_NTHE: Tensor, log_sum_NHT: Tensor) -> Tensor:
    """The gradient of queries, keys and values, [N, T, 3, H, E]."""
    N, _, _, H, E = qkv_NT3HE.shape
    d_qkv_NT3HE = _like_qkv(d_out_NTHE, qkv_NT3HE, out_NTHE, log_sum_NHT)
    given = qkv_NT3HE.contiguous(), out_NTHE.contiguous(), log_sum_NHT, d_out_NTHE.contiguous()
    _launch("backward", N * H, BACKWARD[E], *given, d_qkv_NT3HE)
    return d_qkv_NT3HE


@backward.register_fake
def _like_qkv(d_out_NTHE: Tensor, qkv_NT3HE: Tensor, out_NTHE: Tensor, log_sum_NHT: Tensor) -> Tensor:
    return qkv_NT3HE.new_empty(qkv_NT3HE.shape)


def _launch(name: str, programs: int, tiles: dict[str, int], qkv_NT3HE: Tensor, *tensors: Tensor) -> None:
    """tiles: the kernel's sizes and warps. tensors: those that it takes after qkv."""
    from models import attention_kernels

    _, T, _, H, E = qkv_NT3HE.shape
    kernel, keys = getattr(attention_kernels, name), max(16, 1 << (T - 1).bit_length())  # products have 16 at least
    with torch.cuda.device_of(qkv_NT3HE):  # Triton would launch on the current GPU
        kernel[(programs,)](qkv_NT3HE, *tensors, scale=E**-0.5, T=T, H=H, E=E, K=keys, **tiles)


def _keep(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, d_out_NTHE: Tensor, _: Any) -> Tensor:
    return backward(d_out_NTHE, *ctx.saved_tensors)


short_scaled_dot_product_attention.register_autograd(_differentiate, setup_context=_keep)


# ---- so that a partitioner knows that it is dear


def _heads_first(shape_NT3HE: Any) -> list[int]:
    N, T, _, H, E = shape_NT3HE
    return [N, H, T, E]


@register_flop_formula(torch.ops.mocov3.short_scaled_dot_product_attention)
def _flop(shape_NT3HE: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(*[_heads_first(shape_NT3HE)] * 3)


@register_flop_formula(torch.ops.mocov3.short_scaled_dot_product_attention_backward)
def _backward_flop(_: Any, shape_NT3HE: Any, *__: Any, **___: Any) -> int:
    return sdpa_backward_flop_count(*[_heads_first(shape_NT3HE)] * 4)
